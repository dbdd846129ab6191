/* Decode a region of a JPEG, in full or at 1/2, 1/4 or 1/8 of its size, with libjpeg-turbo.

   Rows above the region are skipped and those below never decoded; of the columns only those around
   the region pass the inverse DCT. The pixels are those of decoding everything and cutting. */

#include <setjmp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <jpeglib.h>

enum { DONE = 0, USE_ANOTHER_DECODER = 1 };

/* Columns decoded on either side, so that chroma is interpolated as in the whole image: more than
   the four that share one sample of chroma at most. */
enum { MARGIN = 16 };

struct error_state {
  struct jpeg_error_mgr manager;
  jmp_buf escape;
};

static void escape(j_common_ptr decoder) {
  longjmp(((struct error_state *)decoder->err)->escape, 1);
}

static void count_warning(j_common_ptr decoder, int level) {
  if (level < 0) decoder->err->num_warnings++;
}

static void no_message(j_common_ptr decoder) { (void)decoder; }

/* Decodes rows [top, top + height) and columns [left, left + width) of the image at 1/`divisor` of
   its size into `out`, RGB [height, width, 3]. `full_height` and `full_width` are what the header
   must say. Anything unusual, warnings included, is left to another decoder. */
int decode_region(const unsigned char *data, unsigned long size, unsigned full_height,
                  unsigned full_width, unsigned divisor, unsigned top, unsigned left,
                  unsigned height, unsigned width, unsigned char *out) {
  struct jpeg_decompress_struct decoder;
  struct error_state errors;
  /* Changed after setjmp, hence volatile. */
  unsigned char *volatile row = NULL;
  volatile int result = USE_ANOTHER_DECODER;

  memset(&decoder, 0, sizeof decoder);
  decoder.err = jpeg_std_error(&errors.manager);
  errors.manager.error_exit = escape;
  errors.manager.emit_message = count_warning;
  errors.manager.output_message = no_message;
  if (setjmp(errors.escape)) goto end;
  jpeg_create_decompress(&decoder);
  jpeg_mem_src(&decoder, data, size);
  jpeg_read_header(&decoder, TRUE);
  if (decoder.image_height != full_height || decoder.image_width != full_width) goto end;
  if (decoder.num_components != 1 && decoder.num_components != 3) goto end;
  decoder.out_color_space = JCS_RGB;
  decoder.scale_num = 1;
  decoder.scale_denom = divisor;
  jpeg_start_decompress(&decoder);
  if (top + height > decoder.output_height || left + width > decoder.output_width) goto end;

  JDIMENSION first = left > MARGIN ? left - MARGIN : 0;
  JDIMENSION last = left + width + MARGIN;
  if (last > decoder.output_width) last = decoder.output_width;
  JDIMENSION columns = last - first;
  jpeg_crop_scanline(&decoder, &first, &columns); /* moves `first` down to a block's edge */
  row = malloc((size_t)columns * 3);
  if (row == NULL) goto end;
  if (top > 0 && jpeg_skip_scanlines(&decoder, top) != top) goto end;
  for (unsigned y = 0; y < height; y++) {
    JSAMPROW target = row;
    if (jpeg_read_scanlines(&decoder, &target, 1) != 1) goto end;
    memcpy(out + (size_t)y * width * 3, row + (size_t)(left - first) * 3, (size_t)width * 3);
  }
  if (errors.manager.num_warnings == 0) result = DONE;
end:
  free(row);
  jpeg_destroy_decompress(&decoder);
  return result;
}
