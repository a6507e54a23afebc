import pytest

from tests.data import chat_tokenizers


@pytest.fixture(scope="session")
def tokenizer_dirs(tmp_path_factory):
    """A directory of a saved tokenizer for each kind of chat template."""
    root = tmp_path_factory.mktemp("tokenizers")
    for name in chat_tokenizers.TEMPLATES:
        chat_tokenizers.build(name).save_pretrained(root / name)
    chat_tokenizers.build_word_level().save_pretrained(root / "words")
    return {path.name: path for path in root.iterdir()}
