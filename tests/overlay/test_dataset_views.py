"""The dataset wrapper: both views of a live teacher agree, mixed or not."""

import pytest
import torch
from overlay_parts import ALWAYS, NEVER, PIPELINES, N, error_of_worker, images_of, loader_of, pipeline, wrap
from timm.data import AugMixDataset, FastCollateMixup, create_transform
from tiny_parts import tiny_teacher

from timm_igkd.distillation.mixup import TwoViewMixup
from timm_igkd.distillation.task import IGDistillationTask
from timm_igkd.errors import InputError, InputTypeError
from timm_igkd.overlay.blend import IGOverlay
from timm_igkd.random_streams import seeded

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")  # of Python from 3.12 on

# ---- the teacher's view


@pytest.mark.parametrize("seed", [0, None])
@pytest.mark.parametrize("name", PIPELINES)
def test_teachers_view_is_the_clean_image_under_the_same_draws(noisy, name, seed):
    with seeded(2):
        pairs = [
            item[0]
            for item in map(wrap(noisy, ALWAYS, pipeline(name), seed=seed, teacher_view="clean").__getitem__, range(N))
        ]
    with seeded(2):
        clean = images_of(wrap(noisy, NEVER, pipeline(name), seed=seed))
    with seeded(2):
        student = images_of(wrap(noisy, ALWAYS, pipeline(name), seed=seed))
    assert torch.equal(torch.stack([pair[1] for pair in pairs]), clean)
    assert torch.equal(torch.stack([pair[0] for pair in pairs]), student)
    assert not torch.equal(clean, student)


def test_views_of_an_image_without_overlay_are_one_object(noisy):
    (student, teacher), _ = wrap(noisy, NEVER, pipeline("RandAugment"), teacher_view="clean")[0]
    assert student is teacher


def test_random_erasing_erases_the_same_pixels_of_both_views(noisy):
    transform = create_transform(24, is_training=True, use_prefetcher=False, re_prob=1.0, mean=(0,) * 3, std=(1,) * 3)
    for index in range(N):
        (student, teacher), _ = wrap(noisy, ALWAYS, transform, teacher_view="clean")[index]
        assert (teacher == 0).all(0).any()
        assert torch.equal((student == 0).all(0), (teacher == 0).all(0))


def test_create_loader_whose_prefetcher_erases_is_refused_for_two_views(noisy):
    with pytest.raises(InputError, match=r"erases the two views differently; use create_loader.use_prefetcher=False"):
        loader_of(wrap(noisy, ALWAYS, teacher_view="clean"), re_prob=0.5)


SIZES = {"input_size_choices": [(24, 24), (32, 32)]}


@pytest.mark.parametrize(
    ("settings", "options", "message"),
    [
        ({"teacher_view": "clean"}, SIZES, "scheduled input sizes put the transform outside of the dataset"),
        ({"seed": 0}, SIZES, "scheduled input sizes put the transform outside of the dataset"),
        ({}, SIZES | {"auto_augment": "rand-m3-n2-p0.5-tigkd"}, "where two views, a seed and tigkd do nothing"),
        ({"seed": 0}, {"use_multi_epochs_loader": True}, "use persistent_workers=True in its place"),
        ({"with_maps": True}, {}, "prefetcher keeps image and label alone of each item"),
    ],
)
def test_loaders_with_which_something_would_be_lost_are_refused(noisy, settings, options, message):
    with pytest.raises(InputError, match=message):
        loader_of(wrap(noisy, ALWAYS, **settings), **options)


@pytest.mark.parametrize(
    ("settings", "options"),
    [
        ({"seed": None}, SIZES),
        ({"seed": None}, {"use_multi_epochs_loader": True}),
        ({"with_maps": True}, {"use_prefetcher": False}),
        ({"with_maps": True}, {"collate_fn": list}),
    ],
)
def test_loaders_with_which_nothing_is_lost_are_made(noisy, settings, options):
    assert len(loader_of(wrap(noisy, ALWAYS, **settings), **options))


@pytest.mark.parametrize(
    "settings", [{"teacher_view": "clean", "seed": None}, {"seed": 0}, {"with_logits": True, "seed": None}]
)
def test_augmentation_splits_that_lose_something_are_refused(noisy, settings):
    """The augmented split of a seeded dataset drew from the worker's generators; items of three were a traceback."""
    told = r"AugMixDataset\) augment outside of the dataset, where two views, a seed, logits and maps do nothing"
    with pytest.raises(InputError, match=told):
        loader_of(AugMixDataset(wrap(noisy, ALWAYS, **settings), 2), num_aug_splits=2)


def test_augmentation_splits_of_one_view_without_a_seed_are_timms(noisy):
    loader = loader_of(AugMixDataset(wrap(noisy, ALWAYS, seed=None), 2), num_aug_splits=2)
    assert next(iter(loader))[0].shape == (8, 3, 24, 24)


@pytest.mark.parametrize(
    ("view", "options"),
    [
        ("clean", {}),
        ("clean", {"re_prob": 0.5, "use_prefetcher": False}),
        ("clean", {"re_prob": 0.5, "is_training": False}),
        ("clean", {"re_prob": 0.5, "no_aug": True}),
        ("same", {"re_prob": 0.5}),
    ],
)
def test_loaders_that_erase_both_views_alike_are_made(view, options, noisy):
    assert len(loader_of(wrap(noisy, ALWAYS, teacher_view=view), **options))


@pytest.mark.parametrize("workers", [0, 2])
def test_two_view_batches_of_the_prefetcher_are_what_the_task_takes(noisy, workers):
    dataset = wrap(noisy, IGOverlay(overlay_prob=0.5), teacher_view="clean")
    torch.manual_seed(0)
    loader = loader_of(dataset, num_workers=workers)
    images, labels = next(iter(loader))
    assert images.shape == (8, 3, 24, 24)
    assert torch.equal(labels[:4], labels[4:])
    overlaid = [(student != teacher).any().item() for student, teacher in zip(*images.chunk(2), strict=True)]
    assert any(overlaid)
    assert not all(overlaid)
    task = IGDistillationTask(
        tiny_teacher(classes=3),
        tiny_teacher(classes=3, seed=1),
        teacher_view="clean",
        view_layout="flat",
        verbose=False,
    )
    assert task(images, labels)["output"].shape == (4, 3)


def test_two_views_without_prefetcher_come_apart(noisy):
    (student, teacher), labels = next(iter(loader_of(wrap(noisy, ALWAYS, teacher_view="clean"), use_prefetcher=False)))
    assert student.shape == teacher.shape == (4, 3, 24, 24)
    assert not torch.equal(student, teacher)
    assert labels.shape == (4,)


def test_students_batches_of_the_prefetcher_are_timms(noisy):
    images, labels = next(iter(loader_of(wrap(noisy, ALWAYS), num_workers=2)))
    assert (images.shape, labels.shape) == ((4, 3, 24, 24), (4,))


# ---- Mixup


def test_timms_mixup_collate_names_the_two_views(noisy):
    dataset = wrap(noisy, ALWAYS, pipeline("crop and flip"), teacher_view="clean")
    collate = FastCollateMixup(mixup_alpha=0.8, num_classes=3)
    with pytest.raises(InputTypeError, match=r"FastCollateMixup cannot mix a dataset with two views .*TwoViewMixup"):
        collate([dataset[index] for index in range(4)])


def test_timms_mixup_collate_names_the_two_views_from_a_worker(noisy):
    collate = FastCollateMixup(mixup_alpha=0.8, num_classes=3)
    loader = loader_of(wrap(noisy, ALWAYS, teacher_view="clean"), num_workers=1, collate_fn=collate)
    error = error_of_worker(loader)
    assert isinstance(error, InputTypeError)
    assert "FastCollateMixup cannot mix a dataset with two views" in str(error)


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
@pytest.mark.parametrize("kind", [{"mixup_alpha": 0.8}, {"mixup_alpha": 0.0, "cutmix_alpha": 1.0}])
def test_two_view_mixup_mixes_both_views_alike(mode, kind):
    mixup = TwoViewMixup(seed=1, num_classes=3, mode=mode, **kind)
    images, labels = torch.rand(8, 3, 16, 16), torch.arange(8) % 3
    student, teacher, target = mixup(images, images.clone(), labels, 0, 5)
    assert torch.equal(student, teacher)
    assert not torch.equal(student, images)
    assert target.shape == (8, 3)
    other = mixup(images, images + 1, labels, 0, 5)[1]
    torch.testing.assert_close(other, teacher + 1)  # mixing is linear, so a shifted view is mixed to a shifted result


def test_two_view_mixup_without_a_teacher_draws_the_same():
    mixup = TwoViewMixup(seed=1, num_classes=3, mixup_alpha=0.8)
    images, labels = torch.rand(8, 3, 16, 16), torch.arange(8) % 3
    both, alone = mixup(images, images, labels, 0, 5), mixup(images, None, labels, 0, 5)
    assert alone[1] is None
    assert torch.equal(both[0], alone[0])
    assert torch.equal(both[2], alone[2])


def test_two_view_mixup_draws_by_seed_epoch_and_batch_and_leaves_its_input():
    images, labels = torch.rand(8, 3, 16, 16), torch.arange(8) % 3
    before = images.clone()

    def mixed(seed: int, *stream: int) -> torch.Tensor:
        return TwoViewMixup(seed=seed, num_classes=3, mixup_alpha=0.8)(images, images, labels, *stream)[2]

    assert torch.equal(mixed(0, 1, 2), mixed(0, 1, 2))
    assert len({tuple(mixed(*stream)[0].tolist()) for stream in ((0, 1, 2), (0, 1, 3), (0, 2, 2), (1, 1, 2))}) == 4
    assert torch.equal(images, before)
