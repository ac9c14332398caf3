#!/usr/bin/env bash
# One task of a job step: runs the command, leaves its exit code for `_step` of common.sh.   task.sh COMMAND ARGUMENT...
trap : USR2 TERM  # for python to answer; bash would die of them and take the answer along
"$@"
code=$?
[ "$code" != 0 ] || exit 0

file="$PECO_EXIT_DIR/code"
left=no
if [ "$(cat "$PECO_EXIT_DIR/word" 2> /dev/null)" = "$PECO_EXIT_WORD" ]; then  # else it is another node's folder, or gone
    if (set -o noclobber && : > "$file") 2> /dev/null; then  # the first task to fail writes it
        { echo "$code" > "$file" && sync "$file"; } 2> /dev/null && left=yes
    elif [ -e "$file" ]; then
        left=yes  # or whoever made the file gives srun a code that is not 0
        if [ "$code" = 2 ] && [ "$(cat "$file" 2> /dev/null)" = 76 ]; then
            echo 2 > "$file"  # a rank that refused its input is why another lost it, though that one was quicker
        fi
    fi
fi
[ "$code" = 75 ] || exit "$code"
[ "$left" = no ] || exit 0  # with 75 srun would kill the ranks that are still on their way out
echo "stopped in good order, and no file can be written to say so; srun is told" >&2
exit 75  # the others get SIGTERM, which this shell and python outlive for KillWait (30 s)
