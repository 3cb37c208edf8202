"""`python -m timm_igkd`, and `torchrun -m timm_igkd` or `accelerate launch -m timm_igkd` for several processes."""

from timm_igkd.cli.main import entry

if __name__ == "__main__":
    entry()
