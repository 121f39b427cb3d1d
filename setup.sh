#!/bin/sh
# Make the environment .venv; called by `make setup` as: sh setup.sh "$(PYTHON)" "$(TORCH)"
#
# uv installs where there is one, else pip. First torch (a CPU wheel where pip is told of one, else the index's, with
# what that build needs), then requirements.lock exactly, then the clone itself goes on the module path. The stamp
# .venv/.complete is written last; an environment that was left half-made is made afresh.
set -eu
named=$1 torch=$2
began=$(date +%s)
here=$PWD
log=$here/.venv/setup.log

fail() {
  echo "error: $1" >&2
  exit 1
}

supported() {
  "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2> /dev/null
}

logged() {
  "$@" > "$log" 2>&1 || {
    cat "$log" >&2
    fail "the set-up stopped (see above); mend that and run 'make setup' again."
  }
}

if command -v uv > /dev/null; then installer=uv; else installer=pip; fi

install() {
  if [ $installer = uv ]; then
    cd / # not in the clone: uv would apply its [tool.uv], which keeps torch out of the lock
    logged uv pip install --quiet --python "$here/.venv/bin/python" "$@"
    cd "$here"
  else
    logged .venv/bin/python -m pip install --quiet --disable-pip-version-check --progress-bar off "$@"
  fi
}

if [ -e .venv/.unfinished ]; then
  echo "an earlier set-up was interrupted: starting again"
  rm -rf .venv
fi
if [ -e .venv ]; then
  supported .venv/bin/python ||
    fail "the folder .venv is no environment of Python 3.11 or 3.12: remove it and run 'make setup' again."
else
  if [ "$named" ]; then set -- "$named"; else set -- python3.11 python3.12 python3 python; fi
  chosen= seen=
  for python in "$@"; do
    if supported "$python"; then
      chosen=$python
      break
    fi
    version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2> /dev/null) || continue
    seen="$seen $version"
  done
  [ "$chosen" ] || fail "Python 3.11 or 3.12 is needed, but ${named:-this machine} offers only:${seen:- none}; \
install one and name it, as in 'make setup PYTHON=/usr/bin/python3.11'."
  echo "setting up .venv with $("$chosen" --version) and $installer"
  mkdir .venv
  touch .venv/.unfinished
  if [ $installer = uv ]; then set -- --without-pip; else set --; fi
  logged "$chosen" -m venv "$@" .venv
fi

echo "  $torch"
install "$torch" -c "$here/requirements.lock"
echo "  $(grep -c == requirements.lock) packages of requirements.lock"
install --no-deps -r "$here/requirements.lock"
logged .venv/bin/python -c '
import pathlib, sysconfig
pathlib.Path(sysconfig.get_path("purelib"), "dmsae.pth").write_text("../../../..")  # relative: the clone may be moved
'
logged .venv/bin/python -c 'import numpy, torch, dmsae_lib'
rm -f .venv/.unfinished
touch .venv/.complete
echo "set up in $(($(date +%s) - began)) s; .venv takes $(du -sh .venv | cut -f1)"
