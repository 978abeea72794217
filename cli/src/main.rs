//! The `skep` command: a client of the Engine API, the daemon, and the daemon's shims, in one
//! binary.

mod client;
mod commands;
mod converge;
mod output;

use std::ffi::OsString;
use std::path::Path;
use std::process::ExitCode;

use clap::{CommandFactory as _, Parser};
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;

/// Swarm-first cluster manager that speaks the Docker Engine API
#[derive(Parser)]
#[command(name = "skep", version, max_term_width = 100, arg_required_else_help = true)]
struct Cli {
    /// Daemon to talk to: unix://PATH or tcp://HOST:PORT [env: SKEP_HOST, DOCKER_HOST]
    #[arg(short = 'H', long, value_name = "SOCKET")]
    host: Option<String>,
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Subcommand)]
enum Command {
    /// Run the daemon of this host
    Daemon(Box<skep_daemon::DaemonArgs>),
    /// Make, join and change a swarm
    #[command(subcommand)]
    Swarm(commands::swarm::SwarmCommand),
    /// Look at and change the nodes of the swarm
    #[command(subcommand)]
    Node(commands::node::NodeCommand),
    /// Create, change and look at services
    #[command(subcommand)]
    Service(commands::service::ServiceCommand),
    /// Make and look at networks that tasks share
    #[command(subcommand)]
    Network(commands::network::NetworkCommand),
    /// Keep secrets for services
    #[command(subcommand)]
    Secret(commands::payload::SecretCommand),
    /// Keep configuration files for services
    #[command(subcommand)]
    Config(commands::payload::ConfigCommand),
    /// List this host's containers
    Ps(commands::system::PsArgs),
    /// Show a container's output
    Logs(commands::system::LogsArgs),
    /// List this host's images
    Images(output::ListArgs),
    /// Fetch an image from its registry
    Pull { image: String },
    /// Say what this host and its swarm are
    Info(output::FormatArg),
    /// Say which versions are in use
    Version(output::FormatArg),
    /// Print completions for a shell
    Completion { shell: clap_complete::Shell },
}

fn main() -> ExitCode {
    let args: Vec<OsString> = std::env::args_os().collect();
    if let Some(code) = run_shim(&args) {
        return code;
    }
    let invoked_as_daemon = Path::new(&args[0]).file_name().is_some_and(|name| name == "skepd");
    let args = if invoked_as_daemon {
        ["skep".into(), "daemon".into()].into_iter().chain(args.into_iter().skip(1)).collect()
    } else {
        args
    };
    let cli = Cli::parse_from(args);
    let result = match cli.command {
        // The daemon's own --host says where it listens.
        Command::Daemon(args) => run_daemon(*args, cli.host),
        command => run_client(cli.host, command),
    };
    match result {
        Ok(code) => code,
        Err(error) => {
            eprintln!("skep: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// The hidden commands by which the daemon starts its helpers; before anything that costs memory.
fn run_shim(args: &[OsString]) -> Option<ExitCode> {
    let text = |index: usize| args.get(index).and_then(|arg| arg.to_str());
    let number = |index: usize| text(index).and_then(|text| text.parse::<i32>().ok());
    let code = match text(1)? {
        "shim" => skep_engine::shim_main(Path::new(args.get(2)?)),
        "shim-exec" => skep_engine::exec_main(Path::new(args.get(2)?)),
        "shim-watch" => {
            skep_engine::watch_main(Path::new(args.get(2)?), number(3)?, [number(4)?, number(5)?, number(6)?])
        }
        "archive-in" => skep_engine::archive_in_main(Path::new(args.get(2)?), Path::new(args.get(3)?)),
        "archive-out" => skep_engine::archive_out_main(Path::new(args.get(2)?), Path::new(args.get(3)?), text(4)?),
        "datapath" => skep_overlay_net::path_main(Path::new(args.get(2)?)),
        _ => return None,
    };
    Some(ExitCode::from(u8::try_from(code).unwrap_or(1)))
}

fn run_daemon(mut args: skep_daemon::DaemonArgs, host: Option<String>) -> anyhow::Result<ExitCode> {
    args.hosts.extend(host);
    let config = skep_daemon::DaemonConfig::load(args)?;
    // No environment filter: its expressions cost megabytes.
    let filter: tracing_subscriber::filter::Targets = format!(
        "warn,openraft=error,libcgroups=error,libcontainer=error,h2=error,skep={level},skep_daemon={level},skep_manager={level},skep_worker={level},skep_engine={level},skep_overlay_net={level},skep_raft_store={level}",
        level = config.log_level
    )
    .parse()?;
    let lines = tracing_subscriber::fmt::layer().with_writer(std::io::stderr).with_ansi(false);
    tracing_subscriber::registry().with(lines).with(filter).init();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(skep_daemon::run(config))?;
    Ok(ExitCode::SUCCESS)
}

fn run_client(host: Option<String>, command: Command) -> anyhow::Result<ExitCode> {
    let client = client::Client::new(host)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        match command {
            Command::Daemon(_) => unreachable!("handled before"),
            Command::Swarm(command) => commands::swarm::run(&client, command).await,
            Command::Node(command) => commands::node::run(&client, command).await,
            Command::Service(command) => commands::service::run(&client, command).await,
            Command::Network(command) => commands::network::run(&client, command).await,
            Command::Secret(command) => commands::payload::run_secret(&client, command).await,
            Command::Config(command) => commands::payload::run_config(&client, command).await,
            Command::Ps(args) => commands::system::ps(&client, args).await,
            Command::Logs(args) => commands::system::logs(&client, args).await,
            Command::Images(args) => commands::system::images(&client, args).await,
            Command::Pull { image } => commands::system::pull(&client, &image).await,
            Command::Info(format) => commands::system::info(&client, format).await,
            Command::Version(format) => commands::system::version(&client, format).await,
            Command::Completion { shell } => {
                clap_complete::generate(shell, &mut Cli::command(), "skep", &mut std::io::stdout());
                Ok(())
            }
        }
    })?;
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }
}
