"""Names and messages never hold a user and password, whatever signs these are made of."""

import pytest

from timm_igkd.errors import without_credentials
from timm_igkd.hub.cards import public_name
from timm_igkd.hub.errors import without_secrets

PLAIN = [
    "https://host/x",
    "https://host:8080/a@v1",
    "http://localhost:80/x/y@main",
    "http://[::1]:80/x@y",
    "https://host/user@example.org",
    "hf://datasets/user/name@refs/pr/1/train.parquet",
    "file://C:/images@home",
    "git+https://host/user/name@v1",
    "user/name@v1",
    "mail@host",
    "https://one:81,https://two:82/x@y",
]


@pytest.mark.parametrize("text", PLAIN)
def test_a_name_without_credentials_stays(text):
    assert without_credentials(text) == text


@pytest.mark.parametrize(
    "secret",
    [
        "user:pass",
        "user",
        "user:p@ss",
        "a@b:p@@ss",
        "user:p/ss",
        "user:/p@s/s",
        ":p/s@s",
        "user:p?s#s",
        "user:hf_ab/cd",
    ],
)
@pytest.mark.parametrize("rest", ["host/x", "host", "host:8080/x"])
def test_credentials_go_whole(secret, rest):
    for text in (f"https://{secret}@{rest}", f"cannot open 'git+https://{secret}@{rest}' twice"):
        wanted = text.replace(f"{secret}@", "")
        assert without_credentials(text) == wanted
        assert secret not in without_secrets(text)
    assert public_name(f"https://{secret}@{rest}") == f"https://{rest}"


def test_every_address_of_a_text_is_cleaned():
    text = "https://u:p@one/x or s3://u:p/q@two/y and https://three/z@1"
    assert without_credentials(text) == "https://one/x or s3://two/y and https://three/z@1"
