#!/usr/bin/env bash
set -euo pipefail

usage() {
    cat <<'USAGE'
Usage: ./scripts/serve.sh [--ask QUESTION] [--model DIR] [--port PORT] [-- ARGUMENT...]

Sets up .venv on the first run and serves an MXFP8 model with the patched sglang, on the
GPU, or emulated on the CPU where no CUDA device is visible.

  --ask QUESTION  ask the served model, print its answer and stop the server
  --model DIR     an MXFP8 checkpoint of your own (default: SmolLM2-135M-Instruct,
                  downloaded and converted on the first run)
  --port PORT     default 30000
  -- ARGUMENT...  for sglang.launch_server; they come last, so they override the defaults,
                  e.g. -- --fp8-gemm-backend flashinfer_cutlass
USAGE
}

fail() {
    echo "serve.sh: $1" >&2
    exit "${2:-1}"
}

question="" model="" port=30000 arguments=()

parse_arguments() {
    while (($#)); do
        case $1 in
            -h | --help) usage && exit ;;
            --ask | --model | --port)
                [[ -n ${2-} ]] || fail "$1 needs a value (see --help)" 2
                case $1 in
                    --ask) question=$2 ;;
                    --model) model=$2 ;;
                    --port) port=$2 ;;
                esac
                shift 2
                ;;
            --) shift && arguments=("$@") && break ;;
            *) fail "unknown argument $1; arguments for sglang's server go after -- (see --help)" 2 ;;
        esac
    done
    # The server's own arguments override: learn where it will listen.
    local i
    for i in "${!arguments[@]}"; do
        case ${arguments[i]} in
            --port) port=${arguments[i + 1]-} ;;
            --port=*) port=${arguments[i]#*=} ;;
        esac
    done
    if [[ ! $port =~ ^[0-9]{1,5}$ ]] || ((10#$port < 1 || 10#$port > 65535)); then
        fail "--port: $port is no port" 2
    fi
    [[ -z $model ]] || check_model
}

check_model() {
    [[ -f $model/config.json ]] ||
        fail "--model: $model has no config.json; give the directory of a Hugging Face checkpoint" 2
    [[ " ${arguments[*]} " == *" --quantization"* ]] ||
        grep -qis mxfp8 "$model/config.json" "$model/hf_quant_config.json" ||
        fail "--model: $model is not in MXFP8; convert it with scripts/convert_to_mxfp8.py, or quantize while loading with -- --quantization mxfp8" 2
}

port_answers() {
    (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null
}

start_server() {
    local device=()
    if cuda_device_visible; then
        echo "Serving $model on the GPU" >&2
    else
        echo "No CUDA device is visible: serving $model on the CPU, where FlashInfer's kernels cannot run and are emulated (SGLANG_MXFP8_EMULATION=1), so its speed says nothing about theirs" >&2
        use_cpu_stand_ins
        # torch.compile would take half a minute of the first answer.
        export SGLANG_MXFP8_EMULATION=1 SGLANG_USE_CPU_ENGINE=1 TORCHDYNAMO_DISABLE=1
        device=(
            --device cpu --attention-backend torch_native --sampling-backend pytorch
            --disable-overlap-schedule --max-total-tokens 8192
        )
    fi
    log="$ROOT/.cache/logs/server-$port.log"
    mkdir -p "${log%/*}"
    # A session of its own, so that all its processes can be stopped by one id.
    setsid "$VENV/bin/python" -m sglang.launch_server --model-path "$model" \
        --fp8-gemm-backend flashinfer_trtllm --port "$port" "${device[@]}" \
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
    local waited
    echo "Starting the server (log: $log)" >&2
    until healthy; do
        kill -0 "$server" 2>/dev/null || fail_with_log "the server stopped while it started"
        waited=$((SECONDS - started))
        ((waited % 5)) || echo "  $waited s: $(last_log_line)" >&2
        sleep 1
    done
    grep -o 'MXFP8: [0-9]* linear layers.*' "$log" >&2 || true
    echo "The server is ready after $((SECONDS - started)) s" >&2
}

fail_with_log() {
    {
        tail -n 20 "$log" | cut -c -300
        echo "Errors in it:"
        grep -E '^[[:alnum:]_.]*(Error|Exception|: error): ' "$log" | cut -c -1000 | uniq | tail -n 3
    } >&2 || true
    fail "$1; the end of $log is above"
}

last_log_line() {
    grep '^\[' "$log" | grep -v 'GET /health' | tail -n 1 | cut -c -100
}

healthy() {
    local status=""
    {
        exec 3<>"/dev/tcp/127.0.0.1/$port" &&
            printf 'GET /health HTTP/1.0\r\n\r\n' >&3 &&
            read -r -t 10 _ status _ <&3
        exec 3>&-
    } 2>/dev/null
    [[ $status == 200 ]]
}

main() {
    parse_arguments "$@"
    ! port_answers || fail "port $port is in use; choose another one with --port"
    # shellcheck source=scripts/setup.sh
    source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
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
    if [[ -n $question ]]; then
        "$VENV/bin/python" "$ROOT/scripts/ask.py" --port "$port" "$question"
    else
        echo "Serving on http://127.0.0.1:$port (OpenAI-compatible, /v1); Ctrl-C stops it" >&2
        while kill -0 "$server" 2>/dev/null; do sleep 1; done
        fail_with_log "the server stopped"
    fi
}

main "$@"; exit
