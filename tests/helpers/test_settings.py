"""A choice is read from the right place, checked once, and refused with a sentence that helps."""

import pytest

from helpers import settings


@pytest.fixture(autouse=True)
def no_saved_choices(monkeypatch, tmp_path):
    monkeypatch.setattr(settings, "SAVED_CHOICES", tmp_path / "settings.json")


def test_load_defaults_need_no_download(monkeypatch):
    monkeypatch.delenv("TUTORIAL_STORAGE")
    cfg = settings.load()
    assert (cfg.data, cfg.data_name) == ("digits", "digits")
    assert cfg.storage == str(settings.DEFAULT_STORAGE)


def test_choose_holds_until_reset():
    settings.choose(epochs=2, data="cifar10")
    assert (settings.load().epochs, settings.load().data_name) == (2, "cifar")
    settings.choose(data=None)
    assert (settings.load().epochs, settings.load().data) == (2, "digits")


def test_load_variable_wins_over_choice(monkeypatch):
    settings.choose(epochs=2)
    monkeypatch.setenv("TUTORIAL_EPOCHS", "7")
    assert settings.load().epochs == 7
    assert settings.env_overrides()["TUTORIAL_EPOCHS"] == "7"


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("data", "no/such/folder", "digits, cifar10, or the path or URI of a folder"),
        ("epochs", 0, "from 1 to 1000"),
        ("epochs", 2.5, "type int"),
        ("workers", -1, "from 1 to 1024"),
        ("batch_size", 1, "from 2 to 65536"),
        ("learning_rate", 0.0, "above 0"),
        ("flip", "maybe", "auto, yes or no"),
        ("on_bad_image", "ignore", "stop or skip"),
        ("logs", "loud", "quiet or verbose"),
        ("image_size", 4, "from 8 to 1024"),
        ("learning_rate", float("nan"), "above 0"),
        ("cifar10_archive", "nowhere.tar.gz", "a file cifar-10-python.tar.gz that exists"),
    ],
)
def test_choose_refuses_a_bad_value(name, value, says):
    with pytest.raises(settings.SettingError, match=f"{name}.*{says}"):
        settings.choose(**{name: value})
    assert not settings.SAVED_CHOICES.exists()


def test_load_refuses_a_variable_that_is_not_a_number(monkeypatch):
    monkeypatch.setenv("TUTORIAL_EPOCHS", "many")
    with pytest.raises(settings.SettingError, match="TUTORIAL_EPOCHS='many' is not a whole number"):
        settings.load()


def test_choose_lists_the_known_settings():
    with pytest.raises(settings.SettingError, match="no setting 'epoch'.*epochs"):
        settings.choose(epoch=3)


def test_load_names_the_damaged_file():
    settings.SAVED_CHOICES.write_text("{")
    with pytest.raises(settings.SettingError, match="settings.json can't be read.*delete that file"):
        settings.load()


def test_choose_makes_a_relative_folder_absolute(monkeypatch, tmp_path):
    (tmp_path / "birds").mkdir()
    monkeypatch.chdir(tmp_path)
    cfg = settings.choose(data="birds")
    assert cfg.data == str(tmp_path / "birds")
    assert cfg.data_name == "birds"


def test_path_keeps_a_uri():
    assert settings.Settings(storage="s3://bucket/x/").path("runs", "a") == "s3://bucket/x/runs/a"


def test_path_keeps_the_query_of_a_uri_at_its_end():
    cfg = settings.Settings(storage="s3://key:secret@bucket/x?endpoint_override=host:9000&scheme=http")
    assert cfg.path("runs", "a") == "s3://key:secret@bucket/x/runs/a?endpoint_override=host:9000&scheme=http"
    assert settings.Settings(storage="/what?").path("runs") == "/what?/runs"


def test_settings_show_no_secret():
    cfg = settings.Settings(data="s3://key:secret@images/birds", storage="s3://key:secret@bucket/x?region=a")
    assert "secret" not in repr(cfg) and "s3://images/birds" in repr(cfg) and "s3://bucket/x?region=a" in repr(cfg)
    assert settings.hide_secret("mail@host or file:///a@b") == "mail@host or file:///a@b"


def test_data_may_be_a_uri():
    cfg = settings.choose(data="s3://bucket/my birds?region=a")
    assert (cfg.data, cfg.data_name) == ("s3://bucket/my birds?region=a", "my-birds")


@pytest.mark.parametrize(("folder", "name"), [("my birds", "my-birds"), ("digits", "digits-folder"), ("ü", "images")])
def test_data_name_suits_a_path(tmp_path, folder, name):
    (tmp_path / folder).mkdir()
    assert settings.choose(data=str(tmp_path / folder)).data_name == name


def test_flips_spares_the_digits_unless_asked():
    flips = [settings.Settings(data=data, flip=flip).flips for data, flip in (("digits", "auto"), ("digits", "yes"))]
    assert flips == [False, True]
    assert settings.Settings(data="cifar10").flips and not settings.Settings(data="cifar10", flip="no").flips


def test_choose_in_a_read_only_checkout_names_the_variable(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(settings, "SAVED_CHOICES", tmp_path / "file" / "settings.json")
    with pytest.raises(settings.SettingError, match="can't be saved .*start JupyterLab with TUTORIAL_EPOCHS=2 instead"):
        settings.choose(epochs=2)


def test_is_chosen_tells_choices_from_defaults(monkeypatch):
    assert not settings.is_chosen("epochs")
    settings.choose(epochs=4)
    monkeypatch.setenv("TUTORIAL_WORKERS", "2")
    assert settings.is_chosen("epochs") and settings.is_chosen("workers") and not settings.is_chosen("seed")
