//! The `phase-moe` command: real forward passes, routing and inspection of Mixture-of-Experts models.
#![forbid(unsafe_code)]
// They panic where the other end is closed: `notice` and `writeln!` do not.
#![deny(clippy::print_stderr, clippy::print_stdout)]

mod bundled;
mod chat;
mod choice;
mod compare;
mod generate;
mod global;
mod hub;
mod inspect;
mod logits;
mod mistake;
mod notice;
mod options;
mod output;
mod place;
mod placement;
mod ranks;
mod replay;
mod report;
mod route;
mod shell;
mod terminal;
mod trace;
mod tune;

use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};

/// Mixture-of-Experts routing, measured in real forward passes of a real model.
#[derive(Parser)]
#[command(name = "phase-moe", version, max_term_width = 100)]
struct Cli {
    #[command(flatten)]
    global: global::Global,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Compare(compare::Compare),
    Generate(generate::Generate),
    Tune(tune::Tune),
    Trace(trace::Trace),
    Route(route::Route),
    Replay(replay::Replay),
    Place(place::Place),
    Logits(logits::Logits),
    Inspect(inspect::Inspect),
    Completions(shell::Completions),
    Man(shell::Man),
}

fn main() -> ExitCode {
    let Cli { global, command } = match Cli::try_parse() {
        Ok(cli) => cli,
        // Every process of a job has the same command line: one tells what is wrong with it.
        Err(error) if ranks::launched_as() > 0 && std::env::args().any(|word| word == "--expert-parallel") => {
            return ExitCode::from(error.exit_code() as u8);
        }
        Err(error) => error.exit(),
    };
    let run = || {
        global.apply()?;
        match command {
            Command::Compare(command) => command.run(&global),
            Command::Generate(command) => command.run(&global),
            Command::Tune(command) => command.run(&global),
            Command::Trace(command) => command.run(&global),
            Command::Route(command) => command.run(&global),
            Command::Replay(command) => command.run(&global),
            Command::Place(command) => command.run(&global),
            Command::Logits(command) => command.run(&global),
            Command::Inspect(command) => command.run(&global),
            Command::Completions(command) => command.run(Cli::command()),
            Command::Man(command) => command.run(Cli::command()),
        }
    };
    let code = match run() {
        Ok(()) => 0,
        // A closed pipe (`| head`) is no failure of ours.
        Err(error) if error.chain().any(is_broken_pipe) => 0,
        Err(error) => {
            notice::error(format_args!("phase-moe: {error:#}"));
            if mistake::is_user_mistake(&error) { 2 } else { 1 }
        }
    };
    ranks::end(code);
    ExitCode::from(code)
}

fn is_broken_pipe(cause: &(dyn std::error::Error + 'static)) -> bool {
    cause.downcast_ref::<std::io::Error>().is_some_and(|error| error.kind() == std::io::ErrorKind::BrokenPipe)
}
