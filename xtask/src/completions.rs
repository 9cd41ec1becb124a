//! `cargo xtask completions`: what a shell needs to complete `xtask`, and through it `cargo xtask`.

use std::process::ExitCode;

use anyhow::Result;
use clap_complete::Shell;

#[derive(clap::Args)]
#[command(after_help = "Install, with one line in the shell's start-up file:
  bash   source <(cargo xtask completions bash)
  zsh    source <(cargo xtask completions zsh)      after compinit
  fish   cargo xtask completions fish | source
Then `cargo xtask <TAB>` works, and `xtask <TAB>` for those with `alias xtask='cargo xtask'`.")]
pub(crate) struct Args {
    /// The shell to complete in
    shell: Completed,
}

#[derive(clap::ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
enum Completed {
    Bash,
    Zsh,
    Fish,
}

/// Cargo's own completion knows no aliases: where the word after `cargo` is `xtask`, the words are handed on without
/// `cargo`, and everywhere else cargo's completion goes on as before.
const BASH: &str = r#"
_cargo_xtask_now=$(complete -p cargo 2>/dev/null | sed -n 's/.* -F \([^ ]*\) .*/\1/p')
# Read twice, it must not take itself for what was there before.
[ "$_cargo_xtask_now" = _cargo_xtask_first ] || _cargo_xtask_before=$_cargo_xtask_now
_cargo_xtask_first() {
    if [ "${COMP_WORDS[1]}" = xtask ] && [ "$COMP_CWORD" -gt 1 ]; then
        COMP_WORDS=("${COMP_WORDS[@]:1}")
        COMP_CWORD=$((COMP_CWORD - 1))
        _xtask xtask "$2" "$3"
    elif [ -n "$_cargo_xtask_before" ]; then
        "$_cargo_xtask_before" "$@"
    fi
}
complete -o bashdefault -o default -F _cargo_xtask_first cargo
"#;

const ZSH: &str = r#"
_cargo_xtask_first() {
    if [[ $words[2] == xtask ]] && (( CURRENT > 2 )); then
        shift words
        (( CURRENT-- ))
        _xtask "$@"
    elif (( $+functions[_cargo] )) || autoload -Uz +X _cargo 2>/dev/null; then
        _cargo "$@"
    fi
}
compdef _cargo_xtask_first cargo
"#;

const FISH: &str = r#"
complete -c cargo -n '__fish_seen_subcommand_from xtask' -f -a '(complete -C (string replace -r "^.*?\\bxtask\\b" xtask -- (commandline -cp)))'
"#;

pub(crate) fn run(args: &Args, mut command: clap::Command) -> Result<ExitCode> {
    let (shell, first) = match args.shell {
        Completed::Bash => (Shell::Bash, BASH),
        Completed::Zsh => (Shell::Zsh, ZSH),
        Completed::Fish => (Shell::Fish, FISH),
    };
    // The commands' names in the script are made from it: a space would end them.
    command = command.bin_name("xtask");
    clap_complete::generate(shell, &mut command, "xtask", &mut std::io::stdout());
    print!("{first}");
    Ok(ExitCode::SUCCESS)
}
