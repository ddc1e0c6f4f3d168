"""
Damaged and made-up files of every kind that the package reads: each gives a valid result or one of
the documented exceptions, see ``mutations.only_raises``. With ``--hypothesis-profile=thorough``,
there are many more of them, and others in every run; ``benchmarks/reliability.py`` counts them.
"""

import io
import json
import logging
import math
import struct
import warnings
import zipfile
from contextlib import redirect_stderr, redirect_stdout

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from mutations import (
    REFUSED,
    Folder,
    arrays,
    bomb,
    damaged,
    damaged_json,
    damaged_png,
    damaged_zip,
    lying_npy,
    lying_safetensors,
    lying_zip,
    network,
    npy,
    odd_states,
    odd_values,
    only_raises,
    state_dict,
    torch_saved,
    unzipped,
    zipped,
)
from PIL import Image
from safetensors.torch import save as safetensors_saved
from torchvision import transforms

from pood_plugins.benchmark.folder import ImageFiles
from pood_plugins.benchmark.openood import PackedCIFAR10, PartialCIFAR10
from pood_plugins.cli import main
from pood_plugins.dataset import ImagePack, read_pack
from pood_plugins.evaluation.cache import Cache
from pood_plugins.model.zoo import load_classifier
from pood_plugins.training.checkpoint import (
    load_checkpoint,
    pack_state,
    save_checkpoint,
    unpack_state,
)

pytestmark = pytest.mark.usefixtures("one_thread")

# strategies are built of strategies, which takes its time
relaxed = settings(suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return Folder(tmp_path_factory.mktemp("fuzz"))


# valid files


def image_content(format, mode="RGB", **options):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 5, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, format, **options)
    return file.getvalue()


def npz_content(**arrays):
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def pack_content(x, y):
    strips = []
    for start in range(0, len(x), 2):
        file = io.BytesIO()
        Image.fromarray(x[start : start + 2].reshape(-1, x.shape[2], 3)).save(
            file, "WEBP", lossless=True
        )
        strips.append((f"strip_{start:05d}.webp", file.getvalue()))
    return zipped([*strips, ("meta.npz", npz_content(y=y))])


X = np.random.default_rng(0).integers(0, 256, (4, 6, 6, 3), dtype=np.uint8)
Y = np.array([3, 0, 2, -1])
STATE = {
    "weights": torch.arange(6.0).reshape(2, 3),
    "text": ["epoch", 3, None, (1.5, True)],
    7: torch.tensor(2, dtype=torch.int16),
}
IMAGES = {
    "png": image_content("PNG"),
    "palette.png": image_content("PNG", "P", transparency=b"\x00\x80\xff"),
    "jpeg": image_content("JPEG", exif=Image.Exif().tobytes()),
    "cmyk.jpeg": image_content("JPEG", "CMYK"),
    "webp": image_content("WEBP"),
    "bmp": image_content("BMP"),
    "tiff": image_content("TIFF", compression="tiff_lzw"),
    "plain.tiff": image_content("TIFF"),
    "gif": image_content("GIF", "P"),
    "ppm": image_content("PPM"),
}
POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(trace) (w) file\n"
PACK, NPZ = pack_content(X, Y), npz_content(x=X, y=Y)
CHECKPOINT = zipped(unzipped(pack_state(STATE)))  # without the time
WEIGHTS = {
    "torch.save": torch_saved(state_dict(), zipped=True),
    "torch.save, legacy": torch_saved(state_dict(), zipped=False),
    "safetensors": safetensors_saved(state_dict()),
}
OTHERS = [PACK, NPZ, CHECKPOINT, *WEIGHTS.values(), IMAGES["png"], IMAGES["gif"], b"text\n" * 9]


def others(*contents):
    """Files of other kinds than these."""
    return [other for other in OTHERS if other not in contents]


def same(a, b):
    """Whether two states are equal to the last bit, and of the same types."""
    if isinstance(a, torch.Tensor):
        return (
            isinstance(b, torch.Tensor)
            and (a.dtype, a.shape, a.layout) == (b.dtype, b.shape, b.layout)
            and bits(a) == bits(b)
        )
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return same(list(a.items()), list(b.items()))
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, float) and not math.isnan(a):
        return struct.pack("d", a) == struct.pack("d", b)
    return a == b or (a != a and b != b)


def bits(tensor):
    plain = tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return plain.view(torch.uint8).numpy().tobytes()


# image packs


def check_pack(folder, name, content, *, intact):
    """
    :param intact: whether the file can only be read as what it was
    """
    path = folder.write(name, content)
    arrays = only_raises("image packs", lambda: read_pack(path), trap=folder.trap, path=path)
    pack = only_raises("image packs", lambda: ImagePack.read(path), trap=folder.trap, path=path)
    assert (arrays is REFUSED) == (pack is REFUSED)
    if pack is REFUSED:
        return
    for array in arrays.values():
        assert type(array) is np.ndarray and not array.dtype.hasobject
    assert pack.x.dtype == np.uint8 and pack.x.ndim == 4 and pack.x.shape[3] == 3
    assert pack.y.dtype == np.int64 and pack.y.shape == pack.x.shape[:1]
    assert np.array_equal(np.sign(pack.y), np.sign(arrays["y"].astype(object)))  # ID and outliers
    if intact:
        assert np.array_equal(pack.x, X) and np.array_equal(pack.y, Y)


@given(data=st.data())
@relaxed
@pytest.mark.parametrize("content", [PACK, NPZ], ids=["webp", "npz"])
def test_image_pack_of_damaged_bytes(data, content, folder):
    new = data.draw(damaged(content, others(PACK, NPZ)))
    check_pack(folder, "bytes.zip", new, intact=True)


@given(data=st.data())
@relaxed
@pytest.mark.parametrize("content", [PACK, NPZ], ids=["webp", "npz"])
def test_image_pack_of_damaged_members(data, content, folder):
    new = data.draw(damaged_zip(content, folder.trap, OTHERS))
    check_pack(folder, "members.zip", new, intact=False)


@given(data=st.data())
@relaxed
def test_image_pack_of_other_arrays(data, folder):
    array = st.one_of(arrays(folder.trap).map(npy), lying_npy())
    members = {"x.npy": npy(X), "y.npy": npy(Y), "z.npy": npy(Y)}
    for name in data.draw(st.sets(st.sampled_from(list(members)), min_size=1)):
        members[name] = data.draw(array)
    if data.draw(st.booleans()):
        # of a shape that images have, so that labels are looked at
        x = np.zeros([4, 6, 6, 3][: data.draw(st.integers(3, 4))], np.uint8)
        members["x.npy"] = npy(x[: data.draw(st.integers(0, 4))])
    check_pack(folder, "arrays.npz", zipped(list(members.items())), intact=False)


# training checkpoints


def read_checkpoint(folder, name, content):
    path = folder.write(name, content)
    return only_raises("checkpoints", lambda: load_checkpoint(path), trap=folder.trap, path=path)


@given(data=st.data())
@relaxed
def test_checkpoint_of_damaged_bytes(data, folder):
    content = data.draw(damaged(CHECKPOINT, others(CHECKPOINT)))
    state = read_checkpoint(folder, "bytes", content)
    assert state is REFUSED or same(state, STATE)


@given(data=st.data())
@relaxed
def test_checkpoint_of_damaged_members(data, folder):
    read_checkpoint(folder, "members", data.draw(damaged_zip(CHECKPOINT, folder.trap, OTHERS)))


@given(data=st.data())
@relaxed
def test_checkpoint_of_another_description(data, folder):
    members = dict(unzipped(CHECKPOINT))
    members["state.json"] = data.draw(damaged_json(json.loads(members["state.json"])))
    state = read_checkpoint(folder, "description", zipped(list(members.items())))
    # whatever a tensor says it is, its bytes can be looked at
    assert state is REFUSED or same(state, state)
    assert {tensor.dtype for tensor in tensors_in(state)} <= DTYPES


def tensors_in(state):
    if isinstance(state, torch.Tensor):
        return [state]
    parts = [*state.keys(), *state.values()] if isinstance(state, dict) else state
    return sum(map(tensors_in, parts), []) if isinstance(parts, (dict, list, tuple)) else []


@given(data=st.data())
@relaxed
def test_message_of_damaged_bytes(data, folder):
    content = data.draw(
        st.one_of(
            damaged(CHECKPOINT, others(CHECKPOINT)), damaged_zip(CHECKPOINT, folder.trap, OTHERS)
        )
    )
    only_raises(
        "messages of processes",
        lambda: unpack_state(content),
        trap=folder.trap,
        allowed=(ValueError,),
    )


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # once per process, of types that are experimental
    for kind in (torch.complex32, getattr(torch, "bcomplex32", torch.complex64)):
        torch.zeros(1, dtype=kind)


def _can_be_shown(dtype):
    try:  # hypothesis shows what it draws, and not every type has all that it takes
        repr(torch.zeros(16, dtype=torch.uint8).view(dtype))
    except (RuntimeError, NotImplementedError):
        return False
    return True


DTYPES = {value for value in vars(torch).values() if isinstance(value, torch.dtype)}
DTYPES = {dtype for dtype in DTYPES if not str(dtype).startswith("torch.q")}
SHOWN = sorted(filter(_can_be_shown, DTYPES - {torch.bool}), key=str)


@st.composite
def tensors(draw):
    dtype = draw(st.sampled_from([torch.bool, *SHOWN]))
    shape = draw(st.lists(st.integers(0, 3), max_size=4))
    if dtype == torch.bool:
        return torch.tensor(draw(st.lists(st.booleans(), max_size=5)), dtype=dtype)
    content = draw(st.binary(min_size=8, max_size=8)) * 2
    values = torch.frombuffer(bytearray(content), dtype=torch.uint8).view(dtype)[:1]
    if dtype in (torch.complex64, torch.complex128) and draw(st.booleans()):
        values = values.conj()
    return values.repeat(shape) if dtype.itemsize > 1 and shape else values.expand(*shape, 1)


#: all that a checkpoint holds
states = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.integers(-(2**200), 2**200),
        st.floats(),
        st.text(),
        st.text(st.characters()),  # with surrogates, which are no valid UTF-8
        tensors(),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.dictionaries(
            st.one_of(st.text(), st.integers(), st.floats(), st.none(), st.tuples(st.text())),
            inner,
            max_size=4,
        ),
    ),
    max_leaves=12,
)


@given(state=states)
@example(state={"": {0: {False: ()}}, "tensor": [], "dict": {}, "tuple": 1})
@relaxed
def test_any_state_comes_back(state, folder):
    path = folder.path / "state"
    save_checkpoint(path, state)
    loaded = only_raises("states", lambda: load_checkpoint(path), trap=folder.trap)
    assert same(loaded, state)


# weights


def check_weights(folder, kind, content, *, intact):
    path = folder.write("w.safetensors" if kind == "safetensors" else "w.pt", content)
    result = only_raises(
        f"weights ({kind})",
        lambda: load_classifier("mutations:network", str(path)),
        trap=folder.trap,
        path=path,
    )
    if result is REFUSED:
        return
    model, _ = result
    assert not model.training
    for name, value in network().state_dict().items():
        loaded = model.state_dict()[name]
        assert (loaded.dtype, loaded.shape) == (value.dtype, value.shape)
        assert not intact or same(loaded, state_dict()[name])


@given(data=st.data())
@relaxed
@pytest.mark.parametrize("kind", WEIGHTS)
def test_weights_of_damaged_bytes(data, kind, folder):
    content = data.draw(damaged(WEIGHTS[kind], others(*WEIGHTS.values())))
    # only an archive has checksums
    check_weights(folder, kind, content, intact=kind == "torch.save")


@given(data=st.data())
@relaxed
def test_weights_of_damaged_members(data, folder):
    content = data.draw(damaged_zip(WEIGHTS["torch.save"], folder.trap, OTHERS))
    check_weights(folder, "torch.save", content, intact=False)


@given(data=st.data(), archive=st.booleans())
@relaxed
def test_weights_of_other_values(data, archive, folder):
    kind = "torch.save" if archive else "torch.save, legacy"
    content = torch_saved(data.draw(odd_states(folder.trap)), archive)
    check_weights(folder, kind, content, intact=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.to(torch.complex64), "0.weight is of torch.complex64 there, and of torch.fl"),
        (lambda t: t.to(torch.int8), "0.weight is of torch.int8 there"),
        (lambda t: t.to("meta"), "save a state dict of dense tensors"),
    ],
    ids=["complex", "integers", "meta"],
)
def test_weights_that_the_network_cannot_have(change, message, folder):
    state = state_dict()
    state["0.weight"] = change(state["0.weight"])
    path = folder.write("w.pt", torch_saved(state, zipped=True))
    with pytest.raises(ValueError, match=rf"w\.pt does not hold weights of .*{message}"):
        load_classifier("mutations:network", str(path))


def test_weights_are_not_compressed(folder):
    content = zipped(unzipped(WEIGHTS["torch.save"]), zipfile.ZIP_DEFLATED)
    path = folder.write("w.pt", content)
    with pytest.raises(ValueError, match=r"w\.pt is damaged .*it is compressed"):
        load_classifier("mutations:network", str(path))


@pytest.mark.parametrize("arch", [".mutations:network", "..:x", "\x00:x", ":x"])
def test_modules_that_have_no_such_name(arch):
    with pytest.raises(LookupError, match="--arch|no architecture is called"):
        load_classifier(arch, None, 2)


@given(data=st.data())
@relaxed
def test_weights_of_another_header(data, folder):
    content = data.draw(lying_safetensors(WEIGHTS["safetensors"]))
    check_weights(folder, "safetensors", content, intact=False)


@given(
    arch=st.one_of(
        st.text(max_size=20),
        st.lists(
            st.sampled_from(["mutations", "timm", "torchvision", ":", ".", "\x00", "network"]),
            max_size=6,
        ).map("".join),
    ),
    weights=st.one_of(st.none(), st.text(max_size=20)),
)
@relaxed
def test_names_of_networks(arch, weights, folder):
    only_raises(
        "names of networks",
        lambda: load_classifier(arch, weights, 2),
        trap=folder.trap,
        allowed=(LookupError, ValueError, OSError),
        remedy=False,
    )


# images


# as any classifier has it: as numbers, the pixels of a large photograph alone take a gigabyte
SMALL = transforms.Compose([transforms.Resize((8, 8)), transforms.ToTensor()])


def check_image(folder, content, name="image.png"):
    path = folder.write(name, content)
    result = only_raises(
        "image files",
        lambda: ImageFiles([path], [0], SMALL)[0],
        trap=folder.trap,
        path=path,
        allowed=(ValueError,),
        warns=(UserWarning, Image.DecompressionBombWarning),  # Pillow's own, of odd metadata
    )
    if result is not REFUSED:
        image, label = result
        assert image.dtype == torch.float32 and image.ndim == 3 and len(image) == 3
        assert 0 <= image.min() and image.max() <= 1 and label == 0


@given(data=st.data(), kind=st.sampled_from(list(IMAGES)))
@relaxed
def test_image_of_damaged_bytes(data, kind, folder):
    wrong = [other for other in IMAGES.values() if other != IMAGES[kind]]
    check_image(folder, data.draw(damaged(IMAGES[kind], [*wrong, POSTSCRIPT, *OTHERS])))


@given(data=st.data(), kind=st.sampled_from(["png", "palette.png"]))
@relaxed
def test_image_of_damaged_chunks(data, kind, folder):
    check_image(folder, data.draw(damaged_png(IMAGES[kind])))


def test_no_postscript_is_run(folder, monkeypatch):
    def run(*_, **__):
        folder.trap.trace.mkdir()

    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", run)
    check_image(folder, POSTSCRIPT)
    with pytest.raises(ValueError, match=r"postscript\.png can't be read.*PostScript.*remove"):
        ImageFiles([folder.write("postscript.png", POSTSCRIPT)], [0])[0]


# OpenOOD's lists and index


@pytest.fixture(scope="module")
def openood_root(folder):
    root = folder.path / "openood"
    (root / "benchmark_imglist" / "cifar10").mkdir(parents=True)
    (root / "a b.png").write_bytes(IMAGES["png"])
    for name in ("test_cifar10.txt", "test_cifar100.txt"):
        (root / "benchmark_imglist" / "cifar10" / name).write_bytes(b"a b.png 3\n")
    return root


odd_labels = st.one_of(
    st.integers().map(str),
    st.sampled_from(["", "-1", "+3", "1.5", "nan", "1_000", "٣", "9" * 5000, "9" * 400, "0x1"]),
)
PATHS = ["a b.png", "../x", "/dev/null", ".", "x" * 300, "x/" * 3000, "\x00", "\x1b[2J", "~", "#"]
odd_paths = st.one_of(st.text(max_size=9), st.sampled_from(PATHS))
odd_lines = st.lists(st.tuples(odd_paths, odd_labels).map(" ".join), max_size=4)


@given(data=st.data(), in_distribution=st.booleans())
@relaxed
def test_image_list(data, in_distribution, folder, openood_root):
    content = data.draw(
        st.one_of(
            damaged(b"# list\na b.png 3\na b.png 0\n\na b.png -1\n", OTHERS),
            odd_lines.map(lambda lines: "\n".join(["a b.png 1", *lines]).encode()),
        )
    )
    lists = openood_root / "benchmark_imglist" / "cifar10"
    path = lists / ("test_cifar10.txt" if in_distribution else "test_cifar100.txt")
    path.write_bytes(content)
    (lists / ("test_cifar100.txt" if in_distribution else "test_cifar10.txt")).write_bytes(
        b"a b.png 3\n"
    )
    benchmark = only_raises(
        "image lists",
        lambda: PartialCIFAR10(openood_root, imglists=openood_root / "benchmark_imglist"),
        trap=folder.trap,
        path=openood_root,
        allowed=(ValueError,),
    )
    if benchmark is not REFUSED:
        (whole,) = benchmark.test_sets()
        for part in whole.datasets:
            assert all(file.exists() for file in part.files)
            torch.tensor(part.labels)  # as a loader does


@given(data=st.data())
@relaxed
def test_index_of_packs(data, folder):
    root = folder.path / "packed"
    root.mkdir(exist_ok=True)
    for name in ("cifar10_test.webp.zip", "cifar100_test.webp.zip"):
        (root / name).write_bytes(PACK)
    rows = np.array([0, 2])
    index = npz_content(cifar10_test=rows, cifar10_val=rows, cifar100_as_ood_test=rows)
    if data.draw(st.booleans()):
        content = data.draw(damaged_zip(index, folder.trap, OTHERS))
    else:
        content = data.draw(damaged(index, OTHERS))
    (root / "openood_index.npz").write_bytes(content)
    benchmark = only_raises(
        "index of packs",
        lambda: PackedCIFAR10(root),
        trap=folder.trap,
        path=root,
        allowed=(ValueError,),
    )
    if benchmark is not REFUSED:
        (whole,) = benchmark.test_sets()
        assert len(whole) > 0
        for part in whole.datasets:
            assert part.x.shape[1:] == X.shape[1:] and len(part.y) == len(part.x)


# the cache of features


@pytest.fixture(scope="module")
def quiet():
    """Every damaged entry is logged."""
    logger = logging.getLogger("pood_plugins")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    yield
    logger.setLevel(level)


@given(data=st.data())
@relaxed
def test_damaged_entry_of_the_cache_is_rebuilt(data, folder, quiet):
    place = folder.path / "cache"
    value = {"features": torch.arange(4.0), "n": 3}
    key = {"model": "a"}
    cache = Cache(place)
    for left in place.glob("*"):  # by the case before: damaged, but of the right content
        left.unlink()
    cache.get("features", key, lambda: value)
    (entry,) = place.iterdir()
    members = dict(unzipped(entry.read_bytes()))
    content = zipped(list(members.items()))  # without the time
    way = data.draw(st.sampled_from(["bytes", "members", "description", "whole"]))
    if way == "bytes":
        new = data.draw(damaged(content, OTHERS))
    elif way == "members":
        # not the value itself with the right checksum, which nobody could tell
        kept = zipped([(name, members[name]) for name in members if name == "state.json"])
        new = data.draw(damaged_zip(kept, folder.trap, OTHERS))
    elif way == "description":
        described = json.loads(members["state.json"])
        whole = dict(described["state"]["dict"])
        other = data.draw(odd_values)
        replaced = {**whole, data.draw(st.sampled_from(["key", "value"])): other}
        described["state"]["dict"] = [[name, part] for name, part in replaced.items()]
        members["state.json"] = json.dumps(described).encode()
        new = zipped(list(members.items()))
    else:
        new = pack_state(data.draw(st.one_of(states, odd_values.filter(_is_state))))
    entry.write_bytes(new)
    found = only_raises(
        "cache", lambda: cache.get("features", key, lambda: value), trap=folder.trap, allowed=()
    )
    assert same(found, value)
    assert same(cache.get("features", key, lambda: 1 / 0), value)  # it is whole again


def _is_state(value):
    try:
        pack_state(value)
    except ValueError:
        return False
    return True


# bombs: files of a megabyte whose content is a thousand times as large


@pytest.mark.parametrize(
    "kind", ["npz", "meta", "strips", "checkpoint", "torch.save", "same tensor"]
)
def test_bombs(kind, folder):
    header = npy(np.zeros((1000, 1000, 1000), np.uint8)[:0])
    header = header.replace(b"(0, 1000, 1000)", b"(2000,1000,1000)")[: len(header)]
    if kind == "npz":
        check_refused(folder, bomb("x.npy", 2000, header), read_pack)
    elif kind == "meta":
        strips = [m for m in unzipped(PACK) if m[0].endswith(".webp")]
        check_refused(
            folder, zipped([*strips, ("meta.npz", bomb("y.npy", 2000, header))]), read_pack
        )
    elif kind == "strips":
        file = io.BytesIO()
        Image.new("RGB", (4000, 4000)).save(file, "WEBP", lossless=True, method=0)
        strips = [(f"{i}.webp", file.getvalue()) for i in range(40)]
        check_refused(folder, zipped([*strips, ("meta.npz", npz_content(y=Y))]), read_pack)
    elif kind == "checkpoint":
        check_refused(folder, bomb("state.json", 2000), load_checkpoint)
    elif kind == "torch.save":
        check_refused(
            folder,
            bomb("archive/data.pkl", 2000, b"\x80\x02"),
            lambda path: load_classifier("mutations:network", str(path)),
        )
    else:
        tensor = {"tensor": 0, "dtype": "uint8", "shape": [10**6]}
        state = {"format": "pood-plugins checkpoint 1", "state": [tensor] * 1000}
        members = [("state.json", json.dumps(state).encode()), ("tensor0", bytes(10**6))]
        check_refused(folder, zipped(members), load_checkpoint)


def check_refused(folder, content, read):
    assert len(content) < 3 * 10**6
    path = folder.write("bomb.zip", content)
    result = only_raises(
        "bombs",
        lambda: read(path),
        trap=folder.trap,
        path=path,
        warns=(Image.DecompressionBombWarning,),
    )
    assert result is REFUSED


@pytest.mark.parametrize("size", [(16000, 11000), (60000, 60000), (2**31 - 1, 1)])
def test_images_of_too_many_pixels(size, folder):
    import zlib

    rows = zlib.compress(bytes(1000))
    header = struct.pack(">2I5B", *size, 8, 2, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in [(b"IHDR", header), (b"IDAT", rows), (b"IEND", b"")]
    )
    check_image(folder, content)
    with pytest.raises(ValueError, match=r"can't be read as an image"):
        ImageFiles([folder.write("large.png", content)], [0])[0]


@given(content=st.sampled_from([PACK, NPZ, CHECKPOINT, WEIGHTS["torch.save"]]), data=st.data())
@relaxed
def test_archives_whose_sizes_are_lies(content, data, folder):
    path = folder.write("lies.zip", data.draw(lying_zip(content)))
    for name, read in {
        "image packs": read_pack,
        "checkpoints": load_checkpoint,
        "weights (torch.save)": lambda path: load_classifier("mutations:network", str(path)),
    }.items():
        only_raises(name, lambda: read(path), trap=folder.trap, path=path)


# the command line

JUNK = [
    "",
    "-",
    "--",
    "-1",
    "0",
    "1e999",
    "nan",
    "9" * 5000,
    "x",
    "a=b",
    "=",
    "a=",
    "a=[1",
    "a={}",
]
JUNK += ["\x00", "x" * 5000, "/nowhere/x", ".", "../..", "~nobody/x", "~", "\ud800", "ä", "a\nb"]
JUNK += ["cpu", "cuda:99", "GROOD", "GROOD(", "all", "a=" + "[" * 2000, "resnet20", "..:x"]
FLAGS = {
    "list": [],
    "benchmark": "detectors seeds train test near far root option arch weights classes size mean "
    "std features-cache max-images batch-size workers device output".split(),
    "fit": "arch weights classes size mean std batch-size workers device resize interpolation "
    "channels calibration holdout outliers tpr fpr detector option seed".split(),
    "score": "batch-size workers device arch output".split(),
    "inspect": [],
    "finetune": "train epochs seed lr alpha beta margin-in margin-out device output".split(),
}
#: with these, a command fails before it computes anything
HOPELESS = {
    "list": [["list", "nonsense"], ["list"], ["list", "losses"]],
    "benchmark": [
        ["benchmark", "folder", "--train", "/nowhere"],
        ["benchmark", "digits", "--root", "/nowhere"],
        ["benchmark", "cifar10-openood", "--root", "/nowhere"],
        ["benchmark", "imagenet-openood"],
        ["benchmark", "nonsense"],
        ["benchmark"],
    ],
    "finetune": [
        ["finetune", "--benchmark", "cifar10", "--data", "/nowhere"],
        ["finetune", "--benchmark", "nonsense"],
        ["finetune"],
    ],
    "fit": [["fit", "--data", "/nowhere", "--output", "fitted"], ["fit", "--data", "/nowhere"]],
    "score": [["score", "--detector", "/nowhere", "--data", "/nowhere"], ["score"]],
    "inspect": [
        ["inspect", "/nowhere"],
        ["inspect", "x" * 5000],
        ["inspect", "\x00"],
        ["inspect"],
    ],
    "": [[], ["--version"], ["nonsense"], ["--help"]],
}


@st.composite
def commands(draw):
    name = draw(st.sampled_from([*HOPELESS, "benchmark", "benchmark", "fit", "finetune"]))
    command = list(draw(st.sampled_from(HOPELESS[name])))
    junk = st.one_of(st.sampled_from(JUNK), st.text(max_size=6))
    for _ in range(draw(st.integers(0, 4))):
        flag = draw(st.sampled_from(FLAGS.get(name, []) + ["nonsense", "resume", "download"]))
        # a working root folder or training set could make a command possible
        if flag in ("root", "train") and command[1:2] != ["nonsense"]:
            continue
        command.append(f"--{flag}")
        command += draw(st.lists(junk, max_size=2))
    return command


@given(command=commands())
@example(command=["benchmark", "nonsense", "--option", "a=" + "[" * 2000])
@relaxed
def test_command_line(command, folder, monkeypatch_module):
    out, err = io.StringIO(), io.StringIO()

    def run():
        with redirect_stdout(out), redirect_stderr(err):
            try:
                return main(command)
            except SystemExit as end:  # of argparse
                return end.code

    status = only_raises("command line", run, trap=folder.trap, allowed=())
    assert status in (0, 1, 2)
    assert "Traceback" not in err.getvalue()
    if status:
        assert err.getvalue().strip()


@pytest.fixture(scope="module")
def monkeypatch_module(folder):
    """Nothing is written but in the folder, and no lists of this machine are found."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder.path)
        patch.setenv("TORCH_HOME", str(folder.path / "torch_home"))
        patch.delenv("POOD_DATA", raising=False)
        yield
