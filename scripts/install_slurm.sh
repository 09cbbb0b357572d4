#!/bin/sh
# Installs Slurm and munge from Debian's packages, for the tests that start a cluster of their own on this machine.
# Nothing is configured and no daemon is left running: the tests bring their configuration.
set -eu

PATH="$PATH:/usr/sbin:/sbin"
missing=""
for program in munged slurmctld slurmd sbatch srun; do
  command -v "$program" >/dev/null 2>&1 || missing="$missing $program"
done
if [ -z "$missing" ]; then
  echo "Slurm is installed: $(slurmd -V)"
  exit 0
fi

if ! command -v apt-get >/dev/null 2>&1; then
  echo "install_slurm.sh: missing:$missing; there is no apt-get here, so install slurm (slurmctld, slurmd, client) and munge" \
    "with this system's package manager" >&2
  exit 3
fi
if [ "$(id -u)" -ne 0 ]; then
  echo "install_slurm.sh: missing:$missing; only root can install them: sudo apt-get install slurm-wlm munge" >&2
  exit 3
fi

# Packages of services start them where an init system runs; 101 tells Debian's scripts not to.
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
  trap 'rm -f "$policy"' EXIT
  printf '#!/bin/sh\nexit 101\n' >"$policy"
  chmod 755 "$policy"
fi
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
apt-get install -y -qq --no-install-recommends slurm-wlm munge
echo "Slurm is installed: $(slurmd -V)"
