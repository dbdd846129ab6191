"""Pre-train: `deepspeed launcher/pretrain.py --preset debug --data DIR`; torchrun or python too."""

from deepmim_scale.train.pretrain import main

if __name__ == "__main__":
    main(prog="pretrain.py")
