#!/usr/bin/env bash
# Fetch the published checkpoints and the example data to where the configs expect them.
# Plain enough for the bash 3.2 of macOS.
set -u
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" || exit 1

readonly NAMES=(celeba places imagenet classifier data)
readonly LPIPS=(alexnet-owt-7be5be79.pth alex.pth vgg16-397923af.pth vgg.pth)
readonly HEADS=richzhang/PerceptualSimilarity/master/lpips/weights/v0.1
readonly QUOTA="Google Drive's daily quota for this file is used up"

usage() {
  cat <<'TEXT'
Usage: ./download.sh [NAME ...]

Fetches the files that the configs in confs/ expect; without a NAME, all of them but ldm and
lpips.

  celeba      data/pretrained/celeba256_250000.pt    2.2 GB
  places      data/pretrained/places256_300000.pt    2.2 GB
  imagenet    data/pretrained/256x256_diffusion.pt   2.2 GB
  classifier  data/pretrained/256x256_classifier.pt  0.2 GB
  data        data/datasets.zip, unpacked to data/datasets/gts and
              data/datasets/gt_keep_masks; files that exist there are kept as they are
  ldm         data/pretrained/inpainting_big.ckpt    3.3 GB or more; only for method: latent. If
              it comes as a zip, inpainting_big.zip beside it, that is unpacked, which for a
              while takes the room twice, and then removed
  lpips       data/pretrained/lpips/*.pth            0.8 GB, four files; only evaluate.py needs
              them, to measure LPIPS

Examples:
  ./download.sh celeba data                what confs/face_example.yml needs
  ./download.sh imagenet classifier data   what the confs/test_inet256_*.yml need

Needs gdown (pip install gdown) for celeba, places and data, curl or wget for imagenet,
classifier, ldm and lpips, unzip for data and ldm, and sha256sum or shasum for lpips. Run the
same command again to resume what was interrupted; what is complete is not fetched again.

Exit status: 0 everything asked for is there, 1 something is missing, 2 wrong usage.
TEXT
}

# describe NAME: what is known of a file, by its name above or, of lpips, its own; fails for an
# unknown one. Sets
#   file                the path that it gets
#   fetch               the function that brings it there
#   download, url       the function that downloads it, and from where
#   page                the link to open in a browser
#   check               the function that tells whether it is complete
#   archive             the zip that it is unpacked from, if there is one
#   min_size, max_size  of a checkpoint, in bytes; max_size is empty if it is not known
#   sha256              its digest, or how that begins; empty if it is not known
describe() {
  fetch=fetch_file
  check=check_checkpoint
  archive=
  sha256=
  case $1 in
    celeba)
      file=data/pretrained/celeba256_250000.pt
      from_drive 1norNWWGYP3EZ_o05DmoW1ryKuKMmhlCX
      fp32_size 552814086
      ;;
    places)
      file=data/pretrained/places256_300000.pt
      from_drive 1QEl-btGbzQz6IwkXiFGd49uQNTUTtHsk
      fp32_size 552814086
      ;;
    imagenet)
      file=data/pretrained/256x256_diffusion.pt
      from_openai 256x256_diffusion.pt
      min_size=2215479544 max_size=2215479544
      ;;
    classifier)
      file=data/pretrained/256x256_classifier.pt
      from_openai 256x256_classifier.pt
      min_size=216496432 max_size=216496432
      ;;
    data)
      fetch=fetch_and_unpack
      check=check_zip
      file=data/datasets.zip
      archive=$file
      from_drive 1Q_dxuyI41AAmSv9ti3780BwaJQqwvwMv
      ;;
    ldm)
      fetch=fetch_itself_or_zipped
      check=check_lightning
      file=data/pretrained/inpainting_big.ckpt
      archive=data/pretrained/inpainting_big.zip
      download=over_http
      url="https://heibox.uni-heidelberg.de/f/4d9ac7ea40c64582b7c9/?dl=1"
      page=$url
      # What it surely holds: the network, its moving average, the autoencoder, three tables.
      # The autoencoder has a second name, under which torch.save may or may not repeat it.
      min_size=$(((387245827 + 387245829 + 53219486 + 3 * 1000) * 4))
      max_size=
      ;;
    alexnet-owt-7be5be79.pth)
      for_lpips "$1" https://download.pytorch.org/models 7be5be79
      fp32_size 61100840
      ;;
    vgg16-397923af.pth)
      for_lpips "$1" https://download.pytorch.org/models 397923af
      fp32_size 138357544
      ;;
    alex.pth)
      for_lpips "$1" "https://raw.githubusercontent.com/$HEADS" \
        df73285e35b22355a2df87cdb6b70b343713b667eddbda73e1977e0c860835c0
      min_size=6009 max_size=6009
      ;;
    vgg.pth)
      for_lpips "$1" "https://raw.githubusercontent.com/$HEADS" \
        a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868
      min_size=7289 max_size=7289
      ;;
    *) return 1 ;;
  esac
}

from_drive() {
  download=with_gdown
  url="https://drive.google.com/uc?id=$1"
  page="https://drive.google.com/file/d/$1/view"
}

from_openai() {
  download=over_http
  url="https://openaipublic.blob.core.windows.net/diffusion/jul-2021/$1"
  page=$url
}

# for_lpips NAME FOLDER SHA256: PyTorch puts the first 8 digits of the digest into the name.
for_lpips() {
  fetch=fetch_and_digest
  file=data/pretrained/lpips/$1
  download=over_http
  url=$2/$1
  page=$url
  sha256=$3
}

# fp32_size N: the file's size is not published, but it holds N weights of 4 bytes, and their
# names and the archive around them take less than 1 MiB.
fp32_size() {
  min_size=$(($1 * 4))
  max_size=$((min_size + 1024 * 1024))
}

have() { command -v "$1" >/dev/null 2>&1; }

size_of() { wc -c <"$1" | tr -d ' '; }

is_web_page() { head -c 512 "$1" | LC_ALL=C grep -aqiE '<(!doctype )?html'; }

# 1 means warnings only: every file in the archive is whole.
unzip_quietly() {
  unzip -qq "$@" </dev/null
  [ $? -le 1 ]
}

# From here to obtain, a function that fails says why in $problem.

is_complete() {
  if is_web_page "$1"; then
    problem="a web page came instead of the file"
    [ "$download" = over_http ] || problem="$QUOTA ($problem)"
    return 1
  fi
  "$check" "$1"
}

check_checkpoint() {
  local size first_bytes
  size=$(size_of "$1")
  if [ "$size" -lt "$min_size" ] || [ "$size" -gt "$max_size" ]; then
    problem="wrong size: $size bytes, expected $min_size"
    [ "$min_size" = "$max_size" ] || problem="$problem to $max_size"
    return 1
  fi
  # torch.save writes a zip archive (PK), and before version 1.6 a bare pickle (80 02).
  first_bytes=$(head -c 2 "$1" | od -An -tx1 | tr -d ' \n')
  case $first_bytes in
    504b | 8002) ;;
    *)
      problem="right size, but not a PyTorch file: it starts with the bytes $first_bytes"
      return 1
      ;;
  esac
  [ -z "$sha256" ] || check_digest "$1"
}

check_digest() {
  local digest
  if have sha256sum; then
    digest=$(sha256sum "$1")
  else
    digest=$(shasum -a 256 "$1") # macOS has this one
  fi
  case $digest in
    "$sha256"*) ;;
    *)
      problem="right size, but other content: its SHA-256 is ${digest%% *}, expected $sha256"
      return 1
      ;;
  esac
}

check_zip() {
  unzip_quietly -t "$1" >/dev/null 2>&1 && return
  problem="damaged or not a zip file: unzip -t refuses it"
  return 1
}

check_lightning() {
  local size names
  size=$(size_of "$1")
  if [ "$size" -lt "$min_size" ]; then
    problem="wrong size: $size bytes, expected $min_size or more"
    return 1
  fi
  check_listing "$1" || return
  is_torch_archive && return
  problem="a zip file, but not a PyTorch file: it holds no data.pkl"
  return 1
}

# The list is at the end of a zip archive, so one that has it is not cut off. Sets $names.
check_listing() {
  names=$(unzip -Z1 "$1" 2>/dev/null </dev/null)
  [ $? -le 1 ] && return
  problem="damaged, or neither a checkpoint nor a zip file: unzip cannot list it"
  return 1
}

is_torch_archive() { printf '%s\n' "$names" | grep -q '^[^/]*/data\.pkl$'; }

fetch_file() {
  local part=$file.part
  is_there && return
  [ ! -e "$file" ] || return # it could not be set aside
  mkdir -p "${file%/*}" || { problem="cannot make the folder ${file%/*}"; return 1; }
  if ! leftover_is_complete; then
    say "$file: downloading from $url"
    "$download" || return
    if ! is_complete "$part"; then
      rm -f "$part"
      problem="$problem; removed, the next run starts afresh"
      return 1
    fi
  fi
  mv -f "$part" "$file" || { problem="cannot rename $part"; return 1; }
}

# Fails if it has to be fetched, and then has set aside what is not the published file.
is_there() {
  [ -e "$file" ] || return
  is_complete "$file" && say "$file: already complete, skipped" && return
  set_aside
  return 1
}

# Somebody else may have put it there, so it is not ours to delete.
set_aside() {
  if [ -e "$file.bad" ] || ! mv "$file" "$file.bad"; then
    problem="the file that is there is not the published one ($problem): move it away"
    return 1
  fi
  say "$file: $problem; moved to $file.bad"
}

# A .part of an earlier run: complete, or else resumed if it can be. With gdown it cannot:
# gdown has a partial file of its own beside it, and renames that to .part at its end.
leftover_is_complete() {
  [ -f "$part" ] || return
  is_complete "$part" && return
  if [ "$download" = over_http ] && ! is_web_page "$part" && may_grow; then
    say "$part: $(size_of "$part") bytes are there, resuming"
  else
    rm -f "$part"
    say "$part: $problem; removed, starting afresh"
  fi
  return 1
}

may_grow() { [ -z "$max_size" ] || [ "$(size_of "$part")" -lt "$max_size" ]; }

over_http() {
  if have curl; then
    curl --fail --location --retry 3 --continue-at - --output "$part" "$url"
  elif have wget; then
    wget --continue --output-document="$part" "$url"
  else
    problem="neither curl nor wget is installed: sudo apt install curl"
    return 1
  fi && return
  broke_off "the download failed with the message above"
}

with_gdown() {
  local gdown
  find_gdown || { problem="gdown is not installed: pip install gdown"; return 1; }
  "${gdown[@]}" --continue -O "$part" "$url" 2>&1 | tee "$log" >&2
  [ -f "$part" ] && return # which it is named only when gdown has all of it
  # gdown wraps its messages, in the middle of a phrase too.
  if LC_ALL=C tr -s '[:space:]' ' ' <"$log" | grep -qiE 'quota|too many users|many accesses'; then
    problem=$QUOTA
    return 1
  fi
  broke_off "gdown failed with the message above"
}

find_gdown() {
  local python
  for gdown in gdown .venv/bin/gdown; do
    have "$gdown" && return
  done
  for python in python python3; do
    "$python" -c 'import gdown' >/dev/null 2>&1 || continue
    gdown=("$python" -m gdown)
    return
  done
  return 1
}

broke_off() {
  problem=$1
  [ -s "$part" ] || rm -f "$part" # wget leaves an empty one
  # gdown adds letters of its own to the name.
  if compgen -G "$part*" >/dev/null; then
    problem="$problem; run the same command again to resume, or delete $part* to start afresh"
  fi
  return 1
}

fetch_and_digest() {
  if ! have sha256sum && ! have shasum; then
    problem="neither sha256sum nor shasum is installed: sudo apt install coreutils"
    return 1
  fi
  fetch_file
}

fetch_and_unpack() {
  have unzip || { problem="unzip is not installed: sudo apt install unzip"; return 1; }
  fetch_file && unpack
}

# In a folder of its own first: an interrupted unzip leaves half a picture, a rename does not.
unpack() {
  local staging=$file.unpacked
  rm -rf "$staging"
  if ! unzip_quietly "$file" -d "$staging"; then
    problem="could not be unpacked, see the message above"
  elif [ ! -d "$staging/datasets/gts" ] || [ ! -d "$staging/datasets/gt_keep_masks" ]; then
    problem="holds no datasets/gts and datasets/gt_keep_masks: delete it and run again"
  elif ! move_new_files; then
    problem="could not be moved to data/datasets, see the message above"
  else
    problem=
    say "data/datasets: unpacked; files that were already there are left as they are"
  fi
  rm -rf "$staging"
  [ -z "$problem" ]
}

move_new_files() {
  local path target
  find "$staging/datasets/gts" "$staging/datasets/gt_keep_masks" -type f |
    while IFS= read -r path; do
      target=data/${path#"$staging"/}
      [ -e "$target" ] && continue
      mkdir -p "${target%/*}" && mv "$path" "$target" || exit 1
    done
}

# What comes is called a zip. The checkpoint is in it or, being a zip archive too, is it.
fetch_itself_or_zipped() {
  have unzip || { problem="unzip is not installed: sudo apt install unzip"; return 1; }
  is_there && return
  [ ! -e "$file" ] || return # it could not be set aside
  fetch_archive && put_in_place
}

fetch_archive() {
  local names file=$archive check=check_listing
  fetch_file
}

put_in_place() {
  local names
  check_listing "$archive" || return
  if is_torch_archive; then
    move_checkpoint "$archive"
  else
    unpack_checkpoint
  fi
}

move_checkpoint() {
  if ! check_lightning "$1"; then
    problem="$archive does not hold the published checkpoint ($problem): delete it and run again"
    return 1
  fi
  mv -f "$1" "$file" || { problem="cannot rename $1"; return 1; }
}

# Its name in the zip does not matter. Zips made on a Mac have __MACOSX/._NAME too: attributes of
# the file, which the pattern *.ckpt leaves out in a folder.
unpack_checkpoint() {
  local staging=$archive.unpacked number status
  number=$(printf '%s\n' "$names" | grep '\.ckpt$' | grep -vc '^__MACOSX/')
  if [ "$number" != 1 ]; then
    problem="$archive holds $number *.ckpt files, not one: see unzip -l $archive"
    return 1
  fi
  say "$archive: unpacking, which takes the room twice"
  rm -rf "$staging"
  extract_checkpoint && move_checkpoint "$staging"/*.ckpt
  status=$?
  rm -rf "$staging"
  [ "$status" = 0 ] || return
  rm -f "$archive"
  say "$file: unpacked; $archive is not needed any more, removed"
}

extract_checkpoint() {
  local status
  unzip -qq -j "$archive" '*.ckpt' -d "$staging" </dev/null
  status=$?
  [ $status -gt 1 ] || return 0
  problem="$archive could not be unpacked, see the message above: delete it and run again"
  [ $status != 50 ] || problem="the disk is too full to unpack $archive: make room and run again"
  return 1
}

say() { printf '%s\n' "$*"; }

# obtain NAME: brings it to its place if that is possible, and adds to the summary.
obtain() {
  describe "$1"
  problem=
  if "$fetch"; then
    summary="$summary
  there    $file"
    return
  fi
  say "$file: $problem"
  missing=yes
  summary="$summary
  MISSING  $file
           why: $problem
           by hand: open $page in a browser
           and save the file as $PWD/${archive:-$file}"
  [ -z "$archive" ] || summary="$summary
           then run ./download.sh $1 again, which checks and unpacks it"
}

[ $# -gt 0 ] || set -- "${NAMES[@]}"
for name in "$@"; do
  case $name in -h | --help)
    usage
    exit
    ;;
  esac
  [ "$name" = lpips ] || describe "$name" && continue
  printf 'download.sh: unknown name "%s"; accepted: %s ldm lpips\n' "$name" "${NAMES[*]}" >&2
  exit 2
done

wanted=()
for name in "$@"; do
  if [ "$name" = lpips ]; then
    wanted+=("${LPIPS[@]}")
  else
    wanted+=("$name")
  fi
done

log=$(mktemp) || exit 1
trap 'rm -f "$log"' EXIT
trap 'say "Interrupted. Run the same command again to resume."; exit 130' INT
say "Note: the weights and the pictures have licences of their own, see README.md."

summary=
missing=
for name in "${wanted[@]}"; do
  obtain "$name"
done
say "
Summary$summary"
[ -z "$missing" ]
