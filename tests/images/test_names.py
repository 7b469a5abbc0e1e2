"""Which mask belongs to which image: by names, in one folder, in sorted order, or not at all."""

import unicodedata
import warnings
from pathlib import Path

import pytest

from guided_diffusion.images.pairs import pair_up
from tests.support.checks import DATASET, check_pairs
from tests.support.pictures import save_images, user_error

NUMBERS = [str(number) for number in range(12)]  # sorted: 0, 1, 10, 11, 2, ...


def paired(gts: str, masks: str, **options: object) -> tuple[dict[str, str], str]:
    """The stem of each image -> that of its mask, in the order of work; and the rule."""
    pairing = pair_up(gts, masks, **options)
    stems = {Path(pair.image_path).stem: Path(pair.mask_path).stem for pair in pairing.pairs}
    assert [pair.index for pair in pairing.pairs] == list(range(len(pairing.pairs)))
    return stems, pairing.rule


def folders(tmp_path: Path, images: list[str], masks: list[str]) -> tuple[str, str]:
    gts = save_images(tmp_path / "gts", *(f"{name}.png" for name in images))
    return gts, save_images(tmp_path / "masks", *(f"{name}.png" for name in masks))


# ---- By name ----


AFFIXES = ["{}_mask", "{}_mask001", "{}-mask", "{}.mask", "{} mask", "{}mask", "mask_{}", "mask{}"]
AFFIXES += ["{}_hole", "{}m", "M-{}", "{}_1a", "{}(1)", "0{}_mask", "mask_{}_v2", "seg.{}"]
FAMILIES = {
    "numbers": NUMBERS,
    "padded": ["007", "010", "100"],
    "one": ["photo"],
    "words": ["a", "a-b", "a_b", "ab", "a b", "a.b", "b_mask", "z"],
    "unicode": ["é", "日本", "ß", "ñ_1"],
    "camera": ["IMG_0001", "IMG_0010", "IMG_0010 (1)"],
}


@pytest.mark.parametrize("affix", AFFIXES)
@pytest.mark.parametrize("family", FAMILIES)
def test_masks_with_one_affix_go_by_name(tmp_path, recwarn, family, affix):
    names = FAMILIES[family]
    stems, rule = paired(*folders(tmp_path, names, [affix.format(name) for name in names]))
    assert stems == {name: affix.format(name) for name in names}
    assert list(stems) == [Path(name).stem for name in sorted(f"{name}.png" for name in names)]
    assert rule == f"by name and {affix.format('…').strip('…')}" and not recwarn


def test_the_case_of_suffix_pairing(tmp_path):
    """1.png goes with 1_mask.png, though sorted order gives it 10_mask.png."""
    gts, masks = folders(tmp_path, NUMBERS, [f"{number}_mask" for number in NUMBERS])
    stems, rule = paired(gts, masks)
    assert stems == {number: f"{number}_mask" for number in NUMBERS} and rule == "by name and _mask"


@pytest.mark.parametrize(
    ("images", "masks"),
    [
        (["a.png", "a.k.jpg"], ["a.jpg", "a.k.png"]),  # the types turn the order round
        (["x/1.png", "y/2.png"], ["2.png", "1.png"]),
        (["x/1.png", "y/1.png"], ["x/1.jpg", "y/1.jpg"]),
        (["A.PNG", "b.png"], ["B.png", "a.png"]),
        (["A.png", "a.png"], ["a.png", "A.png"]),  # they are two names, where both are there
        ([unicodedata.normalize("NFD", "é.png"), "z.png"], ["z.png", "é.png"]),
    ],
)
def test_the_same_stem_goes_first(tmp_path, recwarn, images, masks):
    gts = save_images(tmp_path / "gts", *images)
    pairing = pair_up(gts, save_images(tmp_path / "masks", *masks))
    assert pairing.rule == "by name" and not recwarn
    exact = len({name.casefold() for name in images}) < len(images)
    for pair in pairing.pairs:
        stems = [Path(path).stem for path in (pair.image_path, pair.mask_path)]
        image, mask = (unicodedata.normalize("NFC", stem) for stem in stems)
        assert image == mask if exact else image.casefold() == mask.casefold()


def test_an_affix_that_a_mac_took_apart_is_one(tmp_path):
    gts, masks = folders(tmp_path, NUMBERS, [f"{n}_ma\u0301scara" for n in NUMBERS])
    save_images(Path(masks), "0_m\u00e1scara.png")
    Path(masks, "0_ma\u0301scara.png").unlink()
    stems, rule = paired(gts, masks)
    assert rule == "by name and _m\u00e1scara"
    assert {image: mask.partition("_")[0] for image, mask in stems.items()} == {
        number: number for number in NUMBERS
    }


def test_offset_and_max_len_choose_among_pairs_that_are_found_before(tmp_path):
    gts, masks = folders(tmp_path, NUMBERS, [f"{number}_mask" for number in NUMBERS])
    stems, _ = paired(gts, masks, offset=2, max_len=2)
    assert stems == {"10": "10_mask", "11": "11_mask"}
    assert pair_up(gts, masks, 2, 2).images == 12


def test_start_pictures_go_by_name_too(tmp_path):
    gts, starts = folders(tmp_path, NUMBERS, [f"rough_{number}" for number in NUMBERS])
    pairs = pair_up(gts, f"{gts}/0.png", start_path=starts).pairs
    assert {Path(p.image_path).stem: Path(p.start_path).stem for p in pairs} == {
        number: f"rough_{number}" for number in NUMBERS
    }


# ---- In one folder ----


@pytest.mark.parametrize(
    "affix", ["{}_mask", "{}_mask001", "{}-mask", "mask_{}", "{}_hole", "{}mask"]
)
@pytest.mark.parametrize("family", ["numbers", "one", "camera", "unicode"])
def test_images_and_masks_in_one_folder(tmp_path, recwarn, family, affix):
    names = FAMILIES[family]
    both = names + [affix.format(name) for name in names]
    folder = save_images(tmp_path, *(f"{name}.png" for name in both))
    stems, rule = paired(folder, f"{folder}/")
    assert stems == {name: affix.format(name) for name in names}
    assert rule == f"by name and {affix.format('')}" and not recwarn
    starts = pair_up(folder, folder, start_path=folder).pairs
    assert all(pair.start_path == pair.image_path for pair in starts)


def test_masks_in_a_folder_among_the_images_are_no_images(tmp_path, recwarn):
    save_images(tmp_path, "a.png", "b.png", "masks/a.png", "masks/b.png")
    assert paired(str(tmp_path), f"{tmp_path}/masks") == ({"a": "a", "b": "b"}, "by name")
    assert not recwarn


def test_an_image_without_its_mask_in_one_folder_is_named(tmp_path):
    folder = save_images(tmp_path, "1.png", "1_mask.png", "2.png", "3.png", "3_mask.png")
    message = user_error(pair_up, folder, folder)
    assert "called after their images with _mask" in message
    assert f"1 of 5 pictures have no partner, first {folder}/2.png" in message


@pytest.mark.parametrize(
    "names", [["1", "2", "12"], ["cat", "cats"], ["a", "a_b", "c"], ["1", "11"], ["x"]]
)
def test_a_folder_of_images_alone_has_no_masks(tmp_path, names):
    folder = save_images(tmp_path, *(f"{name}.png" for name in names))
    message = user_error(check_pairs, pair_up(folder, folder).pairs, DATASET, 8)
    assert f"{folder}/{names[0]}.png would be its own mask" in message and "x_mask.png" in message


# ---- In sorted order ----


@pytest.mark.parametrize(
    ("images", "masks"),
    [
        (["a", "b", "c"], ["x", "y", "z"]),
        (["a", "b", "c"], ["a", "b", "z"]),
        (["p1", "p2", "p3"], ["mask 7", "mask 8", "mask 9"]),
        (["1", "2", "3"], ["000000", "000002", "000005"]),
        (["left", "right"], ["1", "2"]),
        (["1", "2"], ["11", "12"]),
        (["a", "b"], ["ab_1", "bc_2"]),
    ],
)
def test_names_that_tell_nothing_leave_sorted_order(tmp_path, images, masks):
    with pytest.warns(UserWarning, match="paired in sorted order") as record:
        assert paired(*folders(tmp_path, images, masks)) == (
            dict(zip(images, masks, strict=True)),
            "in sorted order",
        )
    assert len(record) == 1


def test_the_warning_shows_the_pair_least_alike_and_how_many(tmp_path):
    gts, masks = folders(tmp_path, ["cat1", "dog1", "eel1"], ["cat2", "zebra", "zz_eel9"])
    with pytest.warns(UserWarning, match="the names of 3 of 3 differ") as record:
        pair_up(gts, masks)
    assert str(record[0].message).endswith(f"image {gts}/dog1.png, mask {masks}/zebra.png")


@pytest.mark.parametrize(
    ("images", "masks", "first"),
    [
        (["1", "2", "10"], ["01", "02", "10"], ("10", "02")),
        (["1", "2", "10"], ["mask 01", "mask 02", "mask 10"], ("10", "mask 02")),
        (NUMBERS, [f"m{number:02}" for number in range(12)], ("10", "m02")),
        (["1", "2", "10"], ["1_mask004", "2_mask005", "10_mask006"], ("1", "10_mask006")),
        (["a", "b", "c"], ["b", "c", "d"], ("a", "b")),
        (["1", "2", "3", "4"], ["1_mask", "3_mask", "4_mask", "5_mask"], ("2", "3_mask")),
        (["a", "b", "c"], ["0", "A", "B"], ("b", "A")),
    ],
)
def test_sorted_order_that_contradicts_names_is_refused(tmp_path, images, masks, first):
    gts, folder = folders(tmp_path, images, masks)
    message = user_error(pair_up, gts, folder)
    assert f"first {gts}/{first[0]}.png with {folder}/{first[1]}.png" in message
    assert "give each mask the name of its image" in message


def test_all_images_that_get_another_s_mask_are_counted(tmp_path):
    gts, masks = folders(tmp_path, ["1", "10", "2"], ["10", "1_b", "2_c"])
    assert user_error(pair_up, gts, masks).startswith("sorted order would give 2 of 3 images")


def test_equal_names_in_other_subfolders_stay_in_sorted_order(tmp_path, recwarn):
    save_images(tmp_path / "gts", "a/1.png", "b/1.png")
    save_images(tmp_path / "masks", "c/1.png", "d/1.png")
    pairing = pair_up(f"{tmp_path}/gts", f"{tmp_path}/masks")
    assert [Path(pair.mask_path).parent.name for pair in pairing.pairs] == ["c", "d"]
    assert not recwarn


def test_one_mask_for_all_follows_no_rule(tmp_path):
    gts = save_images(tmp_path / "gts", "a.png", "b.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pair_up(gts, f"{gts}/a.png").rule == ""
