"""The example of a LightningModule does what it says."""

import runpy
from pathlib import Path

import pytest
import torch

pytest.importorskip("lightning", reason="needs the extra lightning")

EXAMPLE = Path(__file__).parent.parent / "examples" / "lightning_module.py"


@pytest.mark.filterwarnings("ignore")  # Lightning's own, at import
def test_the_example_fits_its_data() -> None:
    torch.set_default_dtype(torch.float32)
    main = runpy.run_path(str(EXAMPLE))["main"]
    assert main(60) < 0.2 < main(1)
