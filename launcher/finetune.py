"""Fine-tune: `deepspeed launcher/finetune.py RUN --data DIR`; torchrun or python too."""

from deepmim_scale.finetune.command import main

if __name__ == "__main__":
    main(prog="finetune.py")
