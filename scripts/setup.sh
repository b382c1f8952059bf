#!/usr/bin/env bash
# Makes .venv and installs curriq into it; does nothing when that is already done.
#
#   scripts/setup.sh run     what `curriq train` needs
#   scripts/setup.sh dev     the same, and what the tests and the linters need
#
# Variables:
#   TORCH=auto     (default) the CUDA build where nvidia-smi finds a GPU, otherwise the CPU build
#   TORCH=cpu      the CPU build; on Linux no CUDA package is installed
#   TORCH=cuda     the build of the package index, which on Linux is the CUDA one
#   TORCH=system   keep the torch that the system's Python already has
#   HASHES=1       check every library that is installed against constraints-hashes.txt
#   PYTHON=…       the Python to use (3.11 to 3.14)
set -euo pipefail
cd "$(dirname "$0")/.."

readonly level="${1:?usage: scripts/setup.sh run|dev}"
readonly wanted="${TORCH:-auto}"
readonly venv=.venv
readonly state="$venv/curriq-setup" # "LEVEL TORCH KEY" when done, before that "installing TORCH PID" or "failed TORCH -"
readonly cpu_index=https://download.pytorch.org/whl/cpu
export PIP_DISABLE_PIP_VERSION_CHECK=1

say() { printf 'setup: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }

# Another checkout path or another list of packages is another key.
key() { { pwd; cat pyproject.toml constraints.txt scripts/setup.sh; printf %s "${HASHES:-}"; } | cksum | tr ' ' '-'; }

read_state() { # sets word, torch and rest, empty where there is no state
    word="" torch="" rest=""
    [[ ! -f "$state" ]] || read -r word torch rest <"$state" || true
}

done_already() {
    local word torch rest
    read_state
    [[ "$rest" == "$(key)" && -x "$venv/bin/python" ]] || return 1
    [[ "$wanted" == auto || "$wanted" == "$torch" ]] || return 1
    [[ "$word" == "$level" || "$word" == dev ]]
}

wait_for_other_setup() {
    local word torch rest told=""
    read_state
    while [[ "$word" == installing ]] && kill -0 "$rest" 2>/dev/null; do
        [[ -n "$told" ]] || say "another set-up (process $rest) is at work on $venv, waiting for it"
        told=yes
        sleep 2
        read_state
    done
}

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11 python3.14 python}; do
        if "$candidate" -c 'import sys, ensurepip, venv; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' \
            >/dev/null 2>&1; then
            echo "$candidate"
            return
        fi
    done
    die "no usable Python: found ${PYTHON:-python3} = $("${PYTHON:-python3}" --version 2>&1 || true); curriq needs" \
        "3.11 to 3.14 with its venv module. Install one (Debian and Ubuntu: apt install python3-venv)" \
        "or name one: make run PYTHON=/path/to/python3.12"
}

has_gpu() { command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1; }

torch_choice() { # what was asked for, what the environment has, or what the machine needs
    local word torch rest
    read_state
    case "$wanted" in
        cpu | cuda | system)
            [[ -z "$torch" || "$torch" == "$wanted" ]] ||
                die "$venv was made with TORCH=$torch; to change to TORCH=$wanted remove it first: rm -rf $venv"
            echo "$wanted"
            ;;
        auto) if [[ -n "$torch" ]]; then echo "$torch"; elif has_gpu; then echo cuda; else echo cpu; fi ;;
        *) die "TORCH=$wanted is unknown: choose auto, cpu, cuda or system" ;;
    esac
}

has_pip() { [[ -x "$venv/bin/python" ]] && "$venv/bin/python" -m pip --version >/dev/null 2>&1; }

make_venv() {
    local word torch rest python
    local -a options=()
    read_state
    if [[ "$word" == installing ]]; then
        say "the last set-up was interrupted, starting afresh"
        rm -rf "$venv"
    fi
    if has_pip; then
        echo "installing $1 $$" >"$state"
        return
    fi
    [[ "$1" != system ]] || options+=(--system-site-packages)
    python="$(find_python)"
    say "making $venv with $("$python" --version)"
    mkdir -p "$venv"
    echo "installing $1 $$" >"$state"
    "$python" -m venv ${options[@]+"${options[@]}"} "$venv"
}

pip_install() { "$venv/bin/python" -m pip install --quiet --quiet "$@"; } # twice: errors only

install_torch() {
    local pin range
    pin="$(grep -E '^torch==' constraints.txt)"
    range="$(grep -oE 'torch>=[^"]+' pyproject.toml)"
    case "$1" in
        system)
            pip_install --no-deps --no-index "$range" 2>/dev/null ||
                die "TORCH=system, but the system's Python has no $range; choose TORCH=cpu or TORCH=cuda"
            ;;
        cuda)
            say "installing ${pin/==/ } (CUDA build, some gigabytes: a few minutes)"
            pip_install "$pin"
            ;;
        cpu)
            say "installing ${pin/==/ } (CPU build)"
            if [[ "$(uname -s)" != Linux ]]; then
                pip_install "$pin" # elsewhere the package index holds CPU builds only
            elif ! pip_install --no-deps --no-index "$pin" 2>/dev/null; then # a wheel folder of pip's configuration
                pip_install --no-deps --retries 0 --timeout 20 --index-url "$cpu_index" "$pin" ||
                    die "no CPU build of $pin: $cpu_index cannot be reached and pip knows no folder with the" \
                        "wheel (set PIP_FIND_LINKS to one). The CUDA build works without a GPU too, at several" \
                        "gigabytes: rm -rf $venv; make run TORCH=cuda"
            fi
            ;;
    esac
}

install_hashed() { # of dev; torch, whose build depends on the machine, is there already
    say "installing curriq and its libraries, each checked against constraints-hashes.txt"
    pip_install --require-hashes --no-deps -r constraints-hashes.txt
    pip_install --no-deps --no-build-isolation -e .
}

install_curriq() {
    if [[ -n "${HASHES:-}" ]]; then install_hashed; return; fi
    local constraints=constraints.txt target='.[report]'
    [[ "$level" == run ]] || target='.[dev]'
    if [[ "$1" == system ]]; then # whatever torch is there stays
        constraints="$venv/constraints-system.txt"
        grep -vE '^(torch|triton|nvidia-|cuda-)' constraints.txt >"$constraints"
    fi
    say "installing curriq and its libraries (one to two minutes)"
    pip_install -c "$constraints" -e "$target"
}

main() {
    [[ "$level" == run || "$level" == dev ]] || die "unknown level $level: run or dev"
    wait_for_other_setup
    if done_already; then return; fi
    local choice
    choice="$(torch_choice)"
    trap 'exit 130' INT TERM # leaves "installing" behind, so that the next call starts afresh
    make_venv "$choice"
    # A failure that pip reports itself leaves a clean environment; the next call goes on from there.
    if ! (install_torch "$choice" && install_curriq "$choice"); then
        echo "failed $choice -" >"$state"
        die "the installation failed, see above; run the same command again when the cause is gone"
    fi
    echo "$level $choice $(key)" >"$state"
    say "ready after $SECONDS s"
}

main
