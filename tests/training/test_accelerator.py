"""The accelerator of a run: bfloat16 on every processor, one whole model in each process, and its memory format."""

import re
from datetime import timedelta

import pytest
import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from tiny_parts import ImageList, noise_image, tiny_teacher
from training_parts import create_trainer

from timm_igkd import IGDistillationTask, IGOptions, compute_maps, rounded_bfloat16
from timm_igkd.errors import InputError, RunError
from timm_igkd.training import accelerator
from timm_igkd.training.accelerator import create_accelerator, use_channels_last


@pytest.fixture
def bf16_asked(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    yield
    rounded_bfloat16.compute_in_bfloat16()


def processor(monkeypatch, machine, avx512_bf16=False, amx=False):
    monkeypatch.setattr(rounded_bfloat16.platform, "machine", lambda: machine)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)


@pytest.mark.parametrize("machine", ["x86_64", "AMD64"])
def test_bfloat16_on_a_processor_without_it_is_computed_in_float32(bf16_asked, monkeypatch, tmp_path, machine, capsys):
    processor(monkeypatch, machine)
    assert create_accelerator((), tmp_path).mixed_precision == "bf16"
    assert rounded_bfloat16.computes_in_float32()
    assert capsys.readouterr().err.startswith("note: this processor has no bfloat16; products are computed in float32")


@pytest.mark.parametrize(
    "kind", [("x86_64", True, False), ("x86_64", False, True), ("arm64", False, False), ("aarch64", False, False)]
)
def test_bfloat16_is_taken_where_the_processor_has_it_or_cannot_be_asked(bf16_asked, monkeypatch, tmp_path, kind):
    processor(monkeypatch, *kind)
    assert create_accelerator((), tmp_path).mixed_precision == "bf16"
    assert not rounded_bfloat16.computes_in_float32()


def test_float32_runs_on_every_processor(monkeypatch, tmp_path):
    processor(monkeypatch, "x86_64")
    assert create_accelerator((), tmp_path).mixed_precision == "no"
    assert not rounded_bfloat16.computes_in_float32()


@pytest.mark.parametrize("kind", [DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM])
def test_a_launcher_that_divides_models_is_refused(monkeypatch, tmp_path, kind):
    monkeypatch.setattr(Accelerator, "distributed_type", kind)
    with pytest.raises(InputError, match=f"asks for {kind.value}, which divides a model .*: accelerate launch --multi"):
        create_accelerator((), tmp_path)


@pytest.mark.parametrize("name", ["bfloat16", "BF16", "float16", "fp32", ""])
def test_a_precision_that_accelerate_would_pass_over_is_refused(monkeypatch, tmp_path, name):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", name)
    with pytest.raises(
        InputError, match=re.escape(f"mixed_precision {name!r} is unknown here; give the launcher one of")
    ):
        create_accelerator((), tmp_path)


def test_precisions_of_a_gpu_are_refused_without_one(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(InputError, match="fp16 needs a GPU, and this process has none; give the launcher bf16 or no"):
        create_accelerator((), tmp_path)
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    with pytest.raises(InputError, match=r"the launcher's settings cannot be used .*fp8.*; launch without them"):
        create_accelerator((), tmp_path)


@pytest.mark.parametrize(
    ("name", "value", "remedy"),
    [
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "use --compile in its place"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", "use --grad-accum-steps in its place"),
    ],
)
def test_what_belongs_to_the_run_is_not_taken_from_the_launcher(monkeypatch, tmp_path, name, value, remedy):
    monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=remedy):
        create_accelerator((), tmp_path)
    monkeypatch.setenv(name, "NO" if value == "INDUCTOR" else "1")
    AcceleratorState._reset_state()
    create_accelerator((), tmp_path)


def test_torch_still_names_the_functions_that_tell():
    assert isinstance(torch.cpu._is_avx512_bf16_supported(), bool)
    assert isinstance(torch.cpu._is_amx_tile_supported(), bool)


def test_processes_wait_for_days_for_one_that_works_alone(monkeypatch, tmp_path):
    asked = {}

    class Seen(PartialState):
        def __init__(self, **options):
            asked.update(options)
            super().__init__(**options)

    monkeypatch.setattr("timm_igkd.maps.build.PartialState", Seen)
    handlers = []
    real = accelerator.Accelerator
    monkeypatch.setattr(
        accelerator, "Accelerator", lambda **options: handlers.extend(options["kwargs_handlers"]) or real(**options)
    )
    create_accelerator((), tmp_path)
    compute_maps(
        tiny_teacher(),
        ImageList([noise_image(0)], [0]),
        tmp_path / "maps",
        options=IGOptions(method="none"),
        logits=True,
    )
    assert [handler.timeout for handler in handlers] == [asked["timeout"]] == [timedelta(days=7)]


class Viewer(torch.nn.Module):
    """Reads an image by `view`, which NCHW alone allows."""

    def __init__(self):
        super().__init__()
        like = tiny_teacher(size=16)
        self.fc = torch.nn.Linear(3 * 16 * 16, like.num_classes)
        self.num_classes, self.pretrained_cfg = like.num_classes, like.pretrained_cfg

    def forward(self, image):
        return self.fc(image.view(len(image), -1))


@pytest.mark.parametrize("viewer", ["none", "student", "teacher"])
def test_models_are_channels_last_unless_one_cannot_read_such_images(viewer):
    student, teacher = (Viewer() if viewer == role else tiny_teacher(size=16) for role in ("student", "teacher"))
    task = IGDistillationTask(student, teacher, teacher_view="same", verbose=False)
    expected = torch.contiguous_format if viewer != "none" else torch.channels_last
    assert use_channels_last(task) == expected
    for model in (student, teacher):
        kernels = [weight for weight in model.parameters() if weight.ndim == 4 and weight.shape[1] > 1]
        assert all(weight.is_contiguous(memory_format=expected) for weight in kernels)


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_a_model_with_weights_of_five_dimensions_is_channels_last_but_for_them(role):
    names = {"student": "test_resnet", "teacher": "test_resnet", role: "lambda_resnet26t"}
    models = {role: tiny_teacher(name, size=64) for role, name in names.items()}
    task = IGDistillationTask(models["student"], models["teacher"], teacher_view="same", verbose=False)
    assert use_channels_last(task) == torch.channels_last
    kernels = [m.weight for model in models.values() for m in model.modules() if isinstance(m, torch.nn.Conv2d)]
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in kernels)


@pytest.mark.parametrize(
    ("argv", "launched", "processes", "told"),
    [
        (["/x/timm_igkd/__main__.py", "distill", "--name", "a b"], True, 4, "{} -m timm_igkd distill --name 'a b'"),
        (["/x/timm_igkd/__main__.py", "distill"], False, 1, "python -m timm_igkd distill"),
        (["/x/bin/timm-igkd", "distill"], False, 1, "/x/bin/timm-igkd distill"),
        (["recipes/train_igkd.py", "--seed", "1"], True, 1, "{} recipes/train_igkd.py --seed 1"),
        (["recipes/train_igkd.py"], False, 1, "python recipes/train_igkd.py"),
        (["recipes/train_igkd.py"], False, 2, "{} recipes/train_igkd.py"),  # by torchrun
    ],
)
def test_command_of_a_run_can_be_typed_again(argv, launched, processes, told, monkeypatch):
    monkeypatch.setattr("sys.argv", argv)
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    if launched:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    launch = {"num_processes": processes, "mixed_precision": "bf16"}
    launcher = f"accelerate launch --num_processes {processes} --mixed_precision bf16"
    assert accelerator.command_line(launch) == told.format(launcher)


@pytest.mark.parametrize(
    ("raised", "told"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory."),
            "student is out of GPU memory with 4 images a batch; give a smaller",
        ),
        (
            RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly"),
            r"killed \(DataLoader worker .*lower --workers",
        ),
        (
            RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."),
            r"killed \(.*then go on with --resume",
        ),
    ],
)
def test_what_a_training_lacks_memory_for_is_one_line(raised, told, monkeypatch):
    trainer = create_trainer(Accelerator(cpu=True))
    trainer.label = "student"

    def fail(*arguments):
        raise raised

    monkeypatch.setattr(trainer, "train_step", fail)
    with pytest.raises(RunError, match=told):
        trainer.fit()
    raised = RuntimeError("another")
    with pytest.raises(RuntimeError, match="another"):
        trainer.fit()
