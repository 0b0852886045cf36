#!/usr/bin/env bash
set -euo pipefail

usage() {
    cat <<'USAGE'
Usage: ./scripts/serve.sh [--ask QUESTION] [--model MODEL] [--port PORT] [--release VERSION]
                          [-- ARGUMENT...]

Sets up .venv on the first run (see ./scripts/setup.sh --help) and serves an MXFP8 model with
the patched sglang, on the GPU, or emulated on the CPU where no CUDA device is visible.

  --ask QUESTION  ask the served model, print its answer and stop the server
  --model MODEL   an MXFP8 checkpoint of your own: a folder, or its name on the Hugging Face
                  hub, ORGANISATION/NAME, which the server downloads (default:
                  SmolLM2-135M-Instruct, downloaded and converted on the first run)
  --port PORT     default 30000
  --release VERSION
                  of sglang: 0.5.23 has an environment of its own (default: 0.5.9)
  -- ARGUMENT...  for sglang.launch_server; they come last, so they override the defaults,
                  e.g. -- --fp8-gemm-backend flashinfer_cutlass
USAGE
}

fail() {
    echo "serve.sh: $1" >&2
    exit "${2:-1}"
}

question="" model="" release="" host=127.0.0.1 port=30000 arguments=()

parse_arguments() {
    while (($#)); do
        case $1 in
            -h | --help) usage && exit ;;
            --ask | --model | --port | --release)
                [[ -n ${2-} ]] || fail "$1 needs a value (see --help)" 2
                case $1 in
                    --ask) question=$2 ;;
                    --model) model=$2 ;;
                    --port) port=$2 ;;
                    --release) release=$2 ;;
                esac
                shift 2
                ;;
            --) shift && arguments=("$@") && break ;;
            *) fail "unknown argument $1; arguments for sglang's server go after -- (see --help)" 2 ;;
        esac
    done
    read_server_arguments
    if [[ ! $port =~ ^[0-9]{1,5}$ ]] || ((10#$port < 1 || 10#$port > 65535)); then
        fail "--port: $port is no port" 2
    fi
    port=$((10#$port))
    [[ -z $model ]] || check_model
}

# The server's own arguments override: learn what it will serve, and where.
read_server_arguments() {
    local i argument value
    for i in "${!arguments[@]}"; do
        argument=${arguments[i]}
        value=${arguments[i + 1]-}
        [[ $argument != *=* ]] || value=${argument#*=}
        case ${argument%%=*} in
            --host) host=$value ;;
            --port) port=$value ;;
            --model | --model-path) model=$value ;;
        esac
    done
    case $host in
        0.0.0.0) host=127.0.0.1 ;;
        ::) host=::1 ;;
    esac
}

check_model() {
    if [[ -f $model/config.json ]]; then
        [[ " ${arguments[*]}" == *" --quantization"[\ =]* ]] ||
            grep -qis mxfp8 "$model/config.json" "$model/hf_quant_config.json" ||
            fail "--model: $model is not in MXFP8; convert it with scripts/convert_to_mxfp8.py, or quantize while loading with -- --quantization mxfp8" 2
    elif [[ -e $model || ! $model =~ ^[[:alnum:]][[:alnum:]._-]*/[[:alnum:]._-]+$ ]]; then
        fail "--model: $model has no config.json; give the directory of a Hugging Face checkpoint, or ORGANISATION/NAME for one of its hub" 2
    else
        echo "$model is no folder here: the server looks for it on the Hugging Face hub" >&2
    fi
}

# Holds the port's log until this script and its server have ended.
claim_port() {
    log="$ROOT/.cache/logs/server-$port.log"
    mkdir -p "${log%/*}"
    exec {lock}>>"$log"
    flock -n "$lock" || fail "port $port is in use by another serve.sh; choose another one with --port"
    ! port_answers || fail "port $port is in use; choose another one with --port"
}

port_answers() {
    (exec 3<>"/dev/tcp/$host/$port") 2>/dev/null
}

start_server() {
    local device=()
    if cuda_device_visible; then
        echo "Serving ${model#"$PWD/"} on the GPU" >&2
    else
        echo "No CUDA device is visible: serving ${model#"$PWD/"} on the CPU, where FlashInfer's kernels cannot run and are emulated (SGLANG_MXFP8_EMULATION=1), so its speed says nothing about theirs" >&2
        use_cpu_stand_ins
        # torch.compile would take half a minute of the first answer.
        export SGLANG_MXFP8_EMULATION=1 SGLANG_USE_CPU_ENGINE=1 TORCHDYNAMO_DISABLE=1
        # Threads that wait for each other crawl as soon as another program runs.
        export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
        device=(
            --device cpu --attention-backend torch_native --sampling-backend pytorch
            --disable-overlap-schedule --max-total-tokens 8192
        )
    fi
    # A session of its own, so that all its processes can be stopped by one id.
    setsid "$VENV/bin/python" -m sglang.launch_server --model-path "$model" \
        --fp8-gemm-backend auto --port "$port" "${device[@]}" \
        "${arguments[@]}" >"$log" 2>&1 </dev/null &
    server=$!
    # Or bash would report its end, too.
    disown "$server"
    trap stop_server EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM HUP
}

stop_server() {
    local status=$?
    trap - EXIT
    kill -TERM -- "-$server" 2>/dev/null || true
    for _ in {1..50}; do
        kill -0 -- "-$server" 2>/dev/null || break
        sleep 0.2
    done
    kill -KILL -- "-$server" 2>/dev/null || true
    exit "$status"
}

wait_until_healthy() {
    local shown="" next=$((SECONDS + 2))
    echo "Starting the server (log: ${log#"$PWD/"})" >&2
    until healthy; do
        kill -0 "$server" 2>/dev/null || fail_with_log "the server stopped while it started"
        ! port_answers || server_listens ||
            fail "another program took port $port while the server started; choose another one with --port"
        if ((SECONDS >= next)); then
            show_progress
            next=$((SECONDS + 5))
        fi
        sleep 1
    done
    grep -ao 'MXFP8 linear.*' "$log" >&2 ||
        echo "$log says nothing of MXFP8 linear layers" >&2
    echo "The server is ready after $((SECONDS - started)) s" >&2
}

# Prints the log's last step, unless that is `shown`.
show_progress() {
    local line
    line=$(tail -c 10000 "$log" | tr '\r' '\n' | grep -a -E '^\[|% Completed' |
        grep -a -v /health | tail -n 1 | cut -c -150) || true
    [[ $line != "$shown" ]] || return 0
    shown=$line
    # Without the time.
    echo "  $((SECONDS - started)) s: ${line#\[*\] }" >&2
}

fail_with_log() {
    {
        tail -n 20 "$log" | cut -c -300
        echo "Errors in it:"
        grep -a -E '^[[:alnum:]_.]*(Error|Exception|: error): |\[Errno [0-9]+\]' "$log" |
            cut -c -1000 | uniq | tail -n 3
    } >&2 || true
    fail "$1; the end of $log is above"
}

healthy() {
    local status=""
    server_listens || return 1
    {
        exec 3<>"/dev/tcp/$host/$port" &&
            printf 'GET /health HTTP/1.0\r\n\r\n' >&3 &&
            read -r -t 10 _ status _ <&3
        exec 3>&-
    } 2>/dev/null
    [[ $status == 200 ]]
}

# Is it the server's own process that listens on the port?
server_listens() {
    local inode proc=/proc/$server
    for inode in $(awk -v port="$(printf ':%04X$' "$port")" \
        '$2 ~ port && $4 == "0A" { print $10 }' "$proc/net/tcp" "$proc/net/tcp6" 2>/dev/null); do
        [[ -z $(find "$proc/fd" -lname "socket:\[$inode\]" 2>/dev/null) ]] || return 0
    done
    return 1
}

main() {
    parse_arguments "$@"
    # shellcheck source=scripts/setup.sh
    source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
    [[ -z $release ]] || use_release "$release"
    claim_port
    setup
    if [[ -z $model ]]; then
        get_default_model
        model=$DEFAULT_MODEL
        # Everything is on disk: keep transformers from asking its hub.
        export HF_HUB_OFFLINE=1
    fi
    started=$SECONDS
    start_server
    wait_until_healthy
    local url="http://$host:$port"
    [[ $host != *:* ]] || url="http://[$host]:$port"
    if [[ -n $question ]]; then
        "$VENV/bin/python" "$ROOT/scripts/ask.py" --url "$url" "$question"
    else
        echo "Serving on $url (OpenAI-compatible, /v1); Ctrl-C stops it" >&2
        while kill -0 "$server" 2>/dev/null; do sleep 1; done
        fail_with_log "the server stopped"
    fi
}

main "$@"; exit
