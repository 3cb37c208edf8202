"""Names of repositories: every door takes what the Hub's client takes, and refuses the rest before it is asked."""

import pytest

from timm_igkd import load_labeled_images
from timm_igkd.errors import InputError
from timm_igkd.hub.cards import hub_dataset_id
from timm_igkd.hub.names import is_repo_id
from timm_igkd.hub.transport import check_repo_id
from timm_igkd.maps.push import repository_of

GOOD = ["user/name", "_u/x", "user/name_", "u.s-er/n.a-me", "user/" + "n" * 96]
BAD = [
    "user/a--b",
    "user/a..b",
    "user/a.git",
    "user/name-",
    "user/name.",
    "user./name",
    "-u/name",
    "user/" + "n" * 97,
    "user/na me",
    "user/n\u00e4me",
    "user/name\n",
    "user/",
]


@pytest.mark.parametrize("name", GOOD)
def test_what_the_client_takes_is_a_name_at_every_door(name):
    check_repo_id(name)
    assert repository_of(name, None) == (name, None)
    assert repository_of(f"hf-hub:{name}@refs/pr/1", None) == (name, "refs/pr/1")
    assert hub_dataset_id(name, "abc") == name


@pytest.mark.parametrize("name", BAD)
def test_what_the_client_refuses_is_none(name):
    with pytest.raises(InputError, match="--repo-id must be user/name"):
        check_repo_id(name)
    assert repository_of(name, None) is None
    assert hub_dataset_id(name, "abc") is None
    with pytest.raises(InputError, match="is neither a folder that is there nor an id of the Hub"):
        load_labeled_images(name, "train")


def test_a_name_without_a_user_is_one_to_load_data_by_and_none_to_push_to():
    assert is_repo_id("name")
    assert not is_repo_id("")
    assert repository_of("name", None) is None
    with pytest.raises(InputError, match="--repo-id must be user/name"):
        check_repo_id("name")


def test_an_empty_revision_is_none():
    assert repository_of("user/name@", None) is None
    with pytest.raises(InputError, match="revision 'v1' is of a dataset on the Hub"):
        repository_of("user/name@", "v1")
