//! The `skep` command: a client of the Engine API, the daemon, and the daemon's shims, in one
//! binary.

mod client;
mod commands;
mod context;
mod converge;
mod credentials;
mod daemon_log;
mod endpoint;
mod output;
mod pipes;
mod streams;

use std::ffi::OsString;
use std::path::Path;
use std::process::ExitCode;

use clap::{CommandFactory as _, Parser};

/// Swarm-first cluster manager that speaks the Docker Engine API
#[derive(Parser)]
#[command(
    name = "skep",
    version,
    max_term_width = 100,
    arg_required_else_help = true,
    after_help = "Plugins of docker's client are commands, too, where they are installed: compose, buildx and others."
)]
struct Cli {
    #[command(flatten)]
    target: client::Target,
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Subcommand)]
enum Command {
    /// Run the daemon of this host
    // Of a setting that is given twice, the latter counts: scripts add to what they are given.
    #[command(args_override_self = true)]
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
    /// Bring services up together, as compose files declare them
    #[command(subcommand)]
    Stack(commands::stack::StackCommand),
    /// Make and look at networks that tasks share
    #[command(subcommand)]
    Network(commands::network::NetworkCommand),
    /// Keep secrets for services
    #[command(subcommand)]
    Secret(commands::payload::SecretCommand),
    /// Keep configuration files for services
    #[command(subcommand)]
    Config(commands::payload::ConfigCommand),
    /// Keep data for containers of this host
    #[command(subcommand)]
    Volume(commands::volume::VolumeCommand),
    #[command(flatten)]
    OfContainers(commands::container::ContainerCommand),
    #[command(flatten)]
    OfImages(commands::image::ImageCommand),
    /// Look at and change containers of this host
    #[command(subcommand)]
    Container(commands::container::ContainerGroup),
    /// Build images, and tidy up after builds
    #[command(subcommand)]
    Builder(commands::build::BuilderCommand),
    /// Look at and change images of this host
    #[command(subcommand)]
    Image(commands::image::ImageGroup),
    /// Give daemons names
    #[command(subcommand)]
    Context(commands::context::ContextCommand),
    /// Look at and tidy up this host
    #[command(subcommand)]
    System(commands::system::SystemCommand),
    /// Show anything in full
    Inspect(commands::inspect::InspectArgs),
    /// List this host's containers
    Ps(commands::system::PsArgs),
    /// List this host's images
    Images(commands::image::ImagesArgs),
    /// Look for images on Docker Hub, which the daemon does not ask
    Search {
        /// Only what matches: KEY=VALUE (repeatable)
        #[arg(short, long, value_name = "KEY=VALUE")]
        filter: Vec<String>,
        #[arg(long)]
        limit: Option<u32>,
        #[arg(long)]
        no_trunc: bool,
        #[arg(long)]
        format: Option<String>,
        term: String,
    },
    /// Remove images
    Rmi(commands::image::RemoveArgs),
    /// Tell what happens
    Events(commands::system::EventsArgs),
    /// Log in to a registry
    Login(commands::system::LoginArgs),
    /// Forget a registry's credentials
    Logout {
        /// [default: docker's own]
        #[arg(default_value = "")]
        server: String,
    },
    /// Say how this host stands by the CIS Docker Benchmark
    Audit(commands::audit::AuditArgs),
    /// Say what this host and its swarm are
    Info(output::FormatArg),
    /// Say which versions are in use
    Version(output::FormatArg),
    /// Print completions for a shell
    Completion { shell: clap_complete::Shell },
    #[command(external_subcommand)]
    Plugin(Vec<OsString>),
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
    let mut cli = Cli::parse_from(&args);
    if let Some(dir) = cli.target.config.take() {
        credentials::Config::keep_in(dir);
    }
    let result = match cli.command {
        // The daemon's own --host says where it listens.
        Command::Daemon(args) => run_daemon(*args, cli.target.host),
        Command::Context(command) => cli
            .target
            .context()
            .and_then(|current| commands::context::run(command, &current))
            .map(|()| ExitCode::SUCCESS),
        Command::Plugin(command) => commands::plugin::run(&cli.target, &command, &args),
        command => run_client(&cli.target, command),
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
    let path = |index: usize| args.get(index).map(Path::new);
    let number = |index: usize| text(index).and_then(|text| text.parse::<i32>().ok());
    // Containers, and what carries their packets, are not the daemon.
    let is_helper = |name: &str| name.starts_with("shim") || name == "datapath" || name == "forward";
    if text(1).is_some_and(is_helper) {
        drop(skep_engine::take_usual_turns());
    }
    let code = match text(1)? {
        "shim" => skep_engine::shim_main(path(2)?),
        "shim-exec" => skep_engine::exec_main(path(2)?),
        "shim-mounts" => skep_engine::late_mounts_main(path(2)?, path(3)?, text(4)?),
        "shim-watch" => skep_engine::watch_main(path(2)?, number(3)?, [number(4)?, number(5)?, number(6)?]),
        "archive-in" => skep_engine::archive_in_main(path(2)?, path(3)?, path(4)?, text(5)?, text(6)?),
        "archive-out" => skep_engine::archive_out_main(path(2)?, path(3)?, path(4)?, text(5)?),
        "forward" => skep_engine::forward_main(path(2)?),
        "hold-namespace" => skep_engine::hold_namespace_main(path(2)),
        "datapath" => skep_overlay_net::path_main(path(2)?),
        _ => return None,
    };
    Some(ExitCode::from(u8::try_from(code).unwrap_or(1)))
}

fn run_daemon(mut args: skep_daemon::DaemonArgs, host: Option<String>) -> anyhow::Result<ExitCode> {
    args.hosts.extend(host);
    let only_checks = args.validate;
    let config = skep_daemon::DaemonConfig::load(args)?;
    if only_checks {
        return output::line("configuration OK").map(|()| ExitCode::SUCCESS);
    }
    let set_log_level = daemon_log::begin(&config.log_level, config.log_is_json)?;
    // Managers that are waited for have their turn soon beside containers that take all there is. A convenience, no condition.
    drop(skep_engine::take_short_turns());
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(skep_daemon::run(config, set_log_level))?;
    Ok(ExitCode::SUCCESS)
}

fn run_client(target: &client::Target, command: Command) -> anyhow::Result<ExitCode> {
    let client = client::Client::new(target)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let code = runtime.block_on(dispatch(&client, command));
    // Somebody may still be asked for input that nobody needs any more.
    runtime.shutdown_background();
    code
}

async fn dispatch(client: &client::Client, command: Command) -> anyhow::Result<ExitCode> {
    use commands::container;
    let done = match command {
        // Those that have an exit code of their own to tell.
        Command::OfContainers(command) => return container::run(client, command).await,
        Command::Container(command) => return container::run_group(client, command).await,
        Command::Daemon(_) | Command::Context(_) | Command::Plugin(_) => unreachable!("handled before"),
        Command::Audit(args) => {
            let passed = commands::audit::run(client, &args).await?;
            return Ok(if passed { ExitCode::SUCCESS } else { ExitCode::FAILURE });
        }
        Command::Swarm(command) => commands::swarm::run(client, command).await,
        Command::Node(command) => commands::node::run(client, command).await,
        Command::Service(command) => commands::service::run(client, command).await,
        Command::Stack(command) => commands::stack::run(client, command).await,
        Command::Network(command) => commands::network::run(client, command).await,
        Command::Secret(command) => commands::payload::run_secret(client, command).await,
        Command::Config(command) => commands::payload::run_config(client, command).await,
        Command::Volume(command) => commands::volume::run(client, command).await,
        Command::OfImages(command) => commands::image::run(client, command).await,
        Command::Image(command) => commands::image::run_group(client, command).await,
        Command::System(command) => commands::system::run(client, command).await,
        Command::Inspect(args) => commands::inspect::inspect(client, &args, None, "").await,
        Command::Ps(args) => commands::system::ps(client, args).await,
        Command::Images(args) => commands::image::list(client, &args).await,
        Command::Builder(command) => commands::build::run_builder(client, command).await,
        Command::Search { term, .. } => commands::image::search(client, &term).await,
        Command::Rmi(args) => commands::image::remove(client, &args).await,
        Command::Events(args) => commands::system::events(client, &args).await,
        Command::Login(args) => commands::system::login(client, args).await,
        Command::Logout { server } => commands::system::logout(&server),
        Command::Info(format) => commands::system::info(client, format).await,
        Command::Version(format) => commands::system::version(client, format).await,
        Command::Completion { shell } => {
            clap_complete::generate(shell, &mut Cli::command(), "skep", &mut std::io::stdout());
            Ok(())
        }
    };
    done.map(|()| ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }
}
