"""A choice is read from the right place, checked once, and refused with a sentence that helps."""

import pytest

from helpers import settings


@pytest.fixture(autouse=True)
def no_saved_choices(monkeypatch, tmp_path):
    monkeypatch.setattr(settings, "SAVED_CHOICES", tmp_path / "settings.json")


def test_defaults_need_no_download(monkeypatch):
    monkeypatch.delenv("TUTORIAL_STORAGE")
    chosen = settings.load()
    assert (chosen.data, chosen.data_name) == ("digits", "digits")
    assert chosen.storage == str(settings.DEFAULT_STORAGE)


def test_a_choice_holds_until_it_is_taken_back():
    settings.choose(epochs=2, data="cifar10")
    assert (settings.load().epochs, settings.load().data_name) == (2, "cifar")
    settings.choose(data=None)
    assert (settings.load().epochs, settings.load().data) == (2, "digits")


def test_a_variable_wins_over_a_choice(monkeypatch):
    settings.choose(epochs=2)
    monkeypatch.setenv("TUTORIAL_EPOCHS", "7")
    assert settings.load().epochs == 7
    assert settings.overridden()["TUTORIAL_EPOCHS"] == "7"


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("data", "no/such/folder", "digits, cifar10, or the path of a folder"),
        ("epochs", 0, "from 1 to 1000"),
        ("epochs", 2.5, "type int"),
        ("workers", -1, "from 1 to 1024"),
        ("batch_size", 1, "from 2 to 65536"),
        ("learning_rate", 0.0, "above 0"),
        ("flip", "maybe", "yes, no or auto"),
        ("unreadable", "ignore", "stop or skip"),
        ("logs", "loud", "quiet or verbose"),
        ("cifar10_archive", "nowhere.tar.gz", "a file cifar-10-python.tar.gz that exists"),
    ],
)
def test_a_bad_choice_is_refused_and_not_saved(name, value, says):
    with pytest.raises(settings.SettingError, match=f"{name}.*{says}"):
        settings.choose(**{name: value})
    assert not settings.SAVED_CHOICES.exists()


def test_a_variable_that_is_no_number(monkeypatch):
    monkeypatch.setenv("TUTORIAL_EPOCHS", "many")
    with pytest.raises(settings.SettingError, match="TUTORIAL_EPOCHS='many' is not a whole number"):
        settings.load()


def test_an_unknown_setting_lists_the_known_ones():
    with pytest.raises(settings.SettingError, match="no setting 'epoch'.*epochs"):
        settings.choose(epoch=3)


def test_damaged_choices_name_the_file():
    settings.SAVED_CHOICES.write_text("{")
    with pytest.raises(settings.SettingError, match="settings.json can't be read.*delete that file"):
        settings.load()


def test_a_relative_folder_becomes_absolute(monkeypatch, tmp_path):
    (tmp_path / "birds").mkdir()
    monkeypatch.chdir(tmp_path)
    chosen = settings.choose(data="birds")
    assert chosen.data == str(tmp_path / "birds")
    assert chosen.data_name == "birds"


def test_a_uri_stays_as_it_is():
    assert settings.Settings(storage="s3://bucket/x/").path("runs", "a") == "s3://bucket/x/runs/a"


@pytest.mark.parametrize(("folder", "name"), [("my birds", "my-birds"), ("digits", "digits-folder"), ("ü", "pictures")])
def test_a_folder_gets_a_name_that_suits_a_path(tmp_path, folder, name):
    (tmp_path / folder).mkdir()
    assert settings.choose(data=str(tmp_path / folder)).data_name == name


def test_digits_are_not_mirrored_unless_asked():
    flips = [settings.Settings(data=data, flip=flip).flips for data, flip in (("digits", "auto"), ("digits", "yes"))]
    assert flips == [False, True]
    assert settings.Settings(data="cifar10").flips and not settings.Settings(data="cifar10", flip="no").flips


def test_relative_paths_hold_for_notebooks_in_another_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TUTORIAL_STORAGE", "out")
    settings.make_paths_absolute()
    monkeypatch.chdir("/")
    assert settings.load().storage == str(tmp_path / "out")
