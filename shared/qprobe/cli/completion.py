"""Completion of a command's words in bash and zsh: scripts that hold all words, so that a key press starts no Python."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from qprobe.cli import configuration
from qprobe.settings import UsageError, meant

_SHELLS = ("bash", "zsh")
# A word that ends in = or / is gone on with, so no space follows it. Bash cuts words at = and :, hence COMP_LINE.
_BASH = """\
{function}() {{
  local line=${{COMP_LINE:0:COMP_POINT}} first=${{COMP_WORDS[1]}} words
  local word=${{line##*[[:space:]]}}
  case "$first" in
{cases}
  esac
  if (( COMP_CWORD == 1 )); then words="{first}"; fi
  COMPREPLY=($(compgen -W "$words" -- "$word"))
  if (( ${{#COMPREPLY[@]}} == 0 )); then COMPREPLY=($(compgen -f -- "${{word##*=}}")); return; fi
  case "${{COMPREPLY[0]}}" in *=) compopt -o nospace;; esac
  if [[ $word == *=* ]]; then COMPREPLY=("${{COMPREPLY[@]#${{word%%=*}}=}}"); fi
}}
complete -F {function} {name}
"""
_ZSH = """\
{function}() {{
  local -a words_of
  local first=${{words[2]}}
  case "$first" in
{cases}
  esac
  if (( CURRENT == 2 )); then words_of=({first}); fi
  compadd -S '' -- ${{(M)words_of:#*=}}
  compadd -- ${{words_of:#*=}} || _files
}}
compdef {function} {name}
"""


def settings(package: str, name: str, words: Sequence[str] = ()) -> list[str]:
    """Words of a command line: every GROUP=NAME of a package, and KEY= of the configuration that some words compose."""
    groups = configuration.groups(package)
    chosen = [f"{group}={choice.name}" for group, choices in groups.items() for choice in choices]
    return chosen + [f"{key}=" for key in configuration.keys(package, name, words)]


def script(name: str, shells: Sequence[str], of_command: Mapping[str, Sequence[str]]) -> str:
    """The script of a shell: `eval "$(NAME --completion bash)"`.

    Args:
        name: of the command.
        shells: what stood after --completion: one of _SHELLS.
        of_command: first word of the command line -> the words that may follow it; "" holds the first words themselves, which may
            follow any other first word too.

    Raises:
        UsageError: another shell, or none.
    """
    if len(shells) != 1 or shells[0] not in _SHELLS:
        said = " ".join(shells)
        raise UsageError(f"--completion {said}{meant(said, _SHELLS)}: say --completion bash or --completion zsh.")
    template, case = (_BASH, '    {}) words="{}" ;;') if shells[0] == "bash" else (_ZSH, "    {}) words_of=({}) ;;")
    held = {command: " ".join(sorted(set(words))) for command, words in of_command.items()}
    first = held.pop("")
    cases = "\n".join(case.format(*one) for one in [*held.items(), ("*", first)])  # what fits all comes last
    return template.format(function=f"_{name.replace('-', '_')}", cases=cases, first=first, name=name)
