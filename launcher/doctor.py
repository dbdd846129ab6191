"""Check machines and network: `deepspeed launcher/doctor.py`; torchrun or srun too."""

from deepmim_scale.doctor.command import main

if __name__ == "__main__":
    main(prog="doctor.py")
