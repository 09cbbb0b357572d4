#!/bin/sh
# Installs strace from Debian's packages where that is possible, for the attacks that make system calls fail. Where it is
# not, those tests are skipped and say so, and everything else runs.
set -u

command -v strace >/dev/null 2>&1 && exit 0
if command -v apt-get >/dev/null 2>&1 && [ "$(id -u)" -eq 0 ]; then
  apt-get install --yes --quiet --no-install-recommends strace >/dev/null 2>&1 && exit 0
  apt-get update --quiet >/dev/null 2>&1 && apt-get install --yes --quiet --no-install-recommends strace >/dev/null 2>&1 && exit 0
fi
echo "install_strace.sh: no strace here, so no system call is made to fail: apt-get install strace" >&2
exit 0
