import pytest
from regrad_runner.addresses import check_address, holds_secret, shown_address, without_secrets

SECRET = "s3kret-w0rd"
WITH_SECRETS = [
    f"http://me:{SECRET}@127.0.0.1:5000",
    f"https://{SECRET}@host",
    f"http://:{SECRET}@host",
    f"HTTP://me:{SECRET}@host",
    f"http://me:{SECRET}/with-a-slash@host",
    f"http://me:{SECRET}#mark@host",
    f"http://host/?token={SECRET}",
    f"http://host/?api_key={SECRET}",
    f"http://host/path?a=1&password={SECRET}",
    f"http://host/?a=1#access_token={SECRET}",
    f"postgresql://me:{SECRET}@host/runs",
    f"postgresql+psycopg2://me:{SECRET}@host:5432/runs",
    f"postgresql://host/runs?user=me&password={SECRET}",
    f"mysql+pymysql://me:{SECRET}@host/runs",
    f"mssql+pyodbc:///?odbc_connect=DRIVER%3Dx%3BUID%3Dme%3BPWD%3D{SECRET}",
    f"me:{SECRET}@127.0.0.1",
    f"sqlite:////folder/file.db?key=1&password={SECRET}",
]
WITHOUT = [
    "http://127.0.0.1:5000",
    "https://host/mlflow/",
    "sqlite:////folder/file.db",
    "sqlite:////data/me@work/runs.db",
    "postgresql://me@host/runs",
    "mysql+pymysql://host/runs",
]


@pytest.mark.parametrize("address", WITH_SECRETS)
def test_an_address_with_a_password_is_refused_and_not_shown(address):
    with pytest.raises(
        ValueError, match="tracking_uri must hold no user or password, got "
    ) as said:
        check_address(address)
    assert SECRET not in str(said.value)


def test_the_refusal_names_the_variables_to_use():
    with pytest.raises(
        ValueError, match="MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
    ) as said:
        check_address(f"http://me:{SECRET}@host")
    assert "MLFLOW_TRACKING_TOKEN" in str(said.value)
    with pytest.raises(ValueError, match=r"PGPASSWORD or ~/\.pgpass"):
        check_address(f"postgresql://me:{SECRET}@host/runs")


@pytest.mark.parametrize("address", WITHOUT)
def test_an_address_without_a_password_is_taken_and_shown_as_it_is(address):
    assert check_address(address) == address
    assert shown_address(address) == address
    assert without_secrets(f"no answer from {address}") == f"no answer from {address}"


@pytest.mark.parametrize(
    "address", ["mlruns", "file:///runs", "sqlite:///runs.db", "", "ftp://host"]
)
def test_only_absolute_addresses_of_servers_and_databases_are_taken(address):
    with pytest.raises(ValueError, match="tracking_uri must be an absolute address, got "):
        check_address(address)


@pytest.mark.parametrize("address", WITH_SECRETS)
def test_passwords_in_any_text_are_hidden(address):
    assert SECRET not in shown_address(address)
    for text in (f"no answer from {address}: refused", f"['{address}']", f'{{"uri": "{address}"}}'):
        assert SECRET not in without_secrets(text)


@pytest.mark.parametrize(
    "name",
    ["MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "PGPASSWORD", "AWS_SECRET_ACCESS_KEY"],
)
def test_passwords_of_the_environment_are_hidden(name, monkeypatch):
    monkeypatch.setenv(name, SECRET)
    assert without_secrets(f"Basic me {SECRET}") == "Basic me ***"


def test_a_password_in_the_address_of_the_environment_is_hidden(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:{SECRET}%21@host")
    assert SECRET not in without_secrets(f"me:{SECRET}%21 and {SECRET}! and {SECRET}%21")


def test_texts_about_training_stay_as_they_are():
    for text in ("max_tokens=512", "see https://host/a,b", "author=me", "passes=3", "a@b"):
        assert without_secrets(text) == text
    assert not holds_secret("http://host/path?epochs=3")
