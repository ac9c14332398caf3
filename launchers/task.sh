#!/usr/bin/env bash
# One task of a job step: runs the command, leaves its exit code for `_step` of common.sh.   task.sh COMMAND ARGUMENT...
trap : USR2 TERM  # for python to answer; bash would die of them and take the answer along
"$@"
code=$?
if [ "$code" != 0 ]; then
    (set -o noclobber && echo "$code" > "$PECO_EXIT_FILE") 2> /dev/null  # the first task to fail writes it
    if [ "$code" = 2 ] && [ "$(cat "$PECO_EXIT_FILE")" = 76 ]; then
        echo 2 > "$PECO_EXIT_FILE"  # a rank that refused its input is why another lost it, though that one was quicker
    fi
fi
[ "$code" = 75 ] && exit 0  # else srun would kill the ranks that are still on their way out
exit "$code"
