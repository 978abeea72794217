//! The `skep` command: a client of the Engine API, the daemon, and the daemon's shims, in one
//! binary.

mod client;
mod commands;
mod converge;
mod output;
mod streams;

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
    /// Keep data for containers of this host
    #[command(subcommand)]
    Volume(commands::volume::VolumeCommand),
    /// Run a command in a new container of this host
    Run(Box<commands::container::RunArgs>),
    /// Make a container without starting it
    Create(Box<commands::run::CreateArgs>),
    /// Run one more command in a container
    Exec(commands::container::ExecArgs),
    /// Join a container's input and output
    Attach { container: String },
    /// Start containers
    Start(commands::container::Containers),
    /// Stop containers
    Stop(commands::container::StopArgs),
    /// Stop containers and start them again
    Restart(commands::container::StopArgs),
    /// Send containers a signal
    Kill(commands::container::KillArgs),
    /// Hold all processes of containers
    Pause(commands::container::Containers),
    /// Let held containers go on
    Unpause(commands::container::Containers),
    /// Remove containers
    Rm(commands::container::RmArgs),
    /// Give a container another name
    Rename { container: String, name: String },
    /// Wait until containers have ended; print their exit codes
    Wait(commands::container::Containers),
    /// Show containers in full
    Inspect(commands::container::InspectArgs),
    /// List a container's processes
    Top { container: String },
    /// List a container's published ports
    Port { container: String },
    /// List this host's containers
    Ps(commands::system::PsArgs),
    /// Show a container's output
    Logs(commands::system::LogsArgs),
    /// List this host's images
    Images(output::ListArgs),
    /// Fetch an image from its registry
    Pull { image: String },
    /// Send an image to its registry
    Push { image: String },
    /// Build an image from a Dockerfile
    Build(commands::image::BuildArgs),
    /// Give an image one more name
    Tag { image: String, name: String },
    /// Remove images
    Rmi {
        #[arg(required = true)]
        images: Vec<String>,
        #[arg(short, long)]
        force: bool,
    },
    /// Write images to an archive
    Save {
        #[arg(short, long, value_name = "FILE")]
        output: std::path::PathBuf,
        #[arg(required = true)]
        images: Vec<String>,
    },
    /// Read images from an archive
    Load {
        #[arg(short, long, value_name = "FILE")]
        input: std::path::PathBuf,
    },
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
    let code = runtime.block_on(dispatch(&client, command));
    // Somebody may still be asked for input that nobody needs any more.
    runtime.shutdown_background();
    code
}

async fn dispatch(client: &client::Client, command: Command) -> anyhow::Result<ExitCode> {
    use commands::container;
    let done = match command {
        // Those that have an exit code of their own to tell.
        Command::Run(args) => return container::run(client, *args).await,
        Command::Exec(args) => return container::exec(client, args).await,
        Command::Attach { container } => return container::attach(client, &container).await,
        Command::Start(names) => return container::start(client, &names).await,
        Command::Stop(args) => return container::stop(client, &args, "stop").await,
        Command::Restart(args) => return container::stop(client, &args, "restart").await,
        Command::Kill(args) => return container::kill(client, &args).await,
        Command::Pause(names) => return container::pause(client, &names, "pause").await,
        Command::Unpause(names) => return container::pause(client, &names, "unpause").await,
        Command::Rm(args) => return container::rm(client, &args).await,
        Command::Daemon(_) => unreachable!("handled before"),
        Command::Swarm(command) => commands::swarm::run(client, command).await,
        Command::Node(command) => commands::node::run(client, command).await,
        Command::Service(command) => commands::service::run(client, command).await,
        Command::Network(command) => commands::network::run(client, command).await,
        Command::Secret(command) => commands::payload::run_secret(client, command).await,
        Command::Config(command) => commands::payload::run_config(client, command).await,
        Command::Volume(command) => commands::volume::run(client, command).await,
        Command::Create(args) => container::create(client, *args).await,
        Command::Rename { container, name } => container::rename(client, &container, &name).await,
        Command::Wait(names) => container::wait(client, &names).await,
        Command::Inspect(args) => container::inspect(client, &args).await,
        Command::Top { container } => container::top(client, &container).await,
        Command::Port { container } => container::port(client, &container).await,
        Command::Ps(args) => commands::system::ps(client, args).await,
        Command::Logs(args) => commands::system::logs(client, args).await,
        Command::Images(args) => commands::system::images(client, args).await,
        Command::Pull { image } => commands::system::pull(client, &image).await,
        Command::Push { image } => commands::image::push(client, &image).await,
        Command::Build(args) => commands::image::build(client, &args).await,
        Command::Tag { image, name } => commands::image::tag(client, &image, &name).await,
        Command::Rmi { images, force } => commands::image::rmi(client, &images, force).await,
        Command::Save { output, images } => commands::image::save(client, &images, &output).await,
        Command::Load { input } => commands::image::load(client, &input).await,
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
