//! Containers of one host: `skep run`, `exec`, `rm` and so on.

use std::process::ExitCode;

use anyhow::Context as _;
use hyper::body::Incoming;
use hyper::upgrade::Upgraded;
use hyper::{Method, Response};
use serde_json::{Value, json};

use super::files::{self, CommitArgs, CopyArgs};
use super::image::pull;
use super::inspect::{InspectArgs, inspect};
use super::prune::{self, PruneArgs};
use super::run::{CreateArgs, LimitArgs, create_body, restart_policy};
use super::stats::StatsArgs;
use super::system::{LogsArgs, PsArgs};
use super::values::{environment, file_lines};
use crate::client::{Client, escape, read_json};
use crate::output::{line, socket};
use crate::streams::{Streams, exit_code, hand_signals_on};

/// Within this a process's end follows that of its streams.
const END_LIMIT: std::time::Duration = std::time::Duration::from_secs(1);

/// What is done to containers of this host; each verb stands alone, and behind `skep container`.
#[derive(clap::Subcommand)]
pub(crate) enum ContainerCommand {
    /// Run a command in a new container of this host
    #[command(disable_help_flag = true)]
    Run(Box<RunArgs>),
    /// Make a container without starting it
    #[command(disable_help_flag = true)]
    Create(Box<CreateArgs>),
    /// Run one more command in a container
    Exec(ExecArgs),
    /// Join a container's input and output
    Attach(AttachArgs),
    /// Start containers
    Start(StartArgs),
    /// Stop containers
    Stop(StopArgs),
    /// Stop containers and start them again
    Restart(StopArgs),
    /// Send containers a signal
    Kill(KillArgs),
    /// Hold all processes of containers
    Pause(Containers),
    /// Let held containers go on
    Unpause(Containers),
    /// Change what containers may use
    Update(Box<UpdateArgs>),
    /// Remove containers
    Rm(RmArgs),
    /// Give a container another name
    Rename { container: String, name: String },
    /// Wait until containers have ended; print their exit codes
    Wait(Containers),
    /// List a container's processes
    Top {
        container: String,
        /// Options of ps
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        options: Vec<String>,
    },
    /// List a container's published ports
    Port {
        container: String,
        /// One port alone: PORT[/PROTOCOL]
        port: Option<String>,
    },
    /// Show a container's output
    Logs(LogsArgs),
    /// Show what containers use
    Stats(StatsArgs),
    /// Copy between a container and here
    Cp(CopyArgs),
    /// List what has changed in a container's files
    Diff { container: String },
    /// Write a container's files to an archive
    Export {
        #[arg(short, long, value_name = "FILE")]
        output: Option<std::path::PathBuf>,
        container: String,
    },
    /// Make an image of a container
    Commit(CommitArgs),
}

/// `skep container …`
#[derive(clap::Subcommand)]
pub(crate) enum ContainerGroup {
    #[command(flatten)]
    Verb(ContainerCommand),
    /// List this host's containers
    #[command(visible_aliases = ["list", "ps"])]
    Ls(PsArgs),
    /// Show containers in full
    Inspect(InspectArgs),
    /// Remove containers that do not run
    Prune(PruneArgs),
}

#[derive(clap::Args)]
pub(crate) struct AttachArgs {
    /// Keep our input to ourselves
    #[arg(long)]
    no_stdin: bool,
    #[command(flatten)]
    keys: KeysArgs,
    container: String,
}

/// How a terminal that is joined is left, and who gets our signals.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct KeysArgs {
    /// Keys that leave it running, such as ctrl-p,ctrl-q
    #[arg(long, default_value = "")]
    detach_keys: String,
    /// Hand signals on to it
    #[arg(long, num_args = 0..=1, require_equals = true, default_value_t = true, default_missing_value = "true", action = clap::ArgAction::Set)]
    sig_proxy: bool,
}

#[derive(clap::Args)]
pub(crate) struct StartArgs {
    /// Show its output, and wait for its end
    #[arg(short, long)]
    attach: bool,
    /// Hand our input on
    #[arg(short, long)]
    interactive: bool,
    #[command(flatten)]
    keys: KeysArgs,
    #[command(flatten)]
    names: Containers,
}

#[derive(clap::Args)]
pub(crate) struct UpdateArgs {
    #[command(flatten)]
    limits: LimitArgs,
    /// no, always, unless-stopped, or on-failure[:N]
    #[arg(long)]
    restart: Option<String>,
    #[command(flatten)]
    names: Containers,
}

#[derive(clap::Args)]
pub(crate) struct RunArgs {
    /// Leave it running in the background and print its id
    #[arg(short, long)]
    detach: bool,
    #[command(flatten)]
    keys: KeysArgs,
    #[command(flatten)]
    create: CreateArgs,
}

#[derive(clap::Args)]
pub(crate) struct ExecArgs {
    /// Leave it running in the background
    #[arg(short, long)]
    detach: bool,
    /// Hand our input on
    #[arg(short, long)]
    interactive: bool,
    /// Give it a terminal
    #[arg(short, long)]
    tty: bool,
    /// NAME=value, or the name of one of our own variables (repeatable)
    #[arg(short, long = "env", value_name = "NAME[=VALUE]")]
    env: Vec<String>,
    /// A file with a variable on each line
    #[arg(long = "env-file", value_name = "FILE")]
    env_files: Vec<std::path::PathBuf>,
    /// Keys that leave it running, such as ctrl-p,ctrl-q
    #[arg(long, default_value = "")]
    detach_keys: String,
    #[arg(short, long, value_name = "USER[:GROUP]", default_value = "")]
    user: String,
    #[arg(short, long, value_name = "DIR", default_value = "")]
    workdir: String,
    #[arg(long)]
    privileged: bool,
    container: String,
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    command: Vec<String>,
}

/// Containers by name or id.
#[derive(clap::Args)]
pub(crate) struct Containers {
    #[arg(required = true)]
    pub(crate) containers: Vec<String>,
}

#[derive(clap::Args)]
pub(crate) struct StopArgs {
    /// Seconds before it is killed
    #[arg(short, long, visible_alias = "timeout", allow_hyphen_values = true)]
    time: Option<i64>,
    /// Signal to send instead of its own
    #[arg(short, long)]
    signal: Option<String>,
    #[command(flatten)]
    names: Containers,
}

#[derive(clap::Args)]
pub(crate) struct KillArgs {
    #[arg(short, long, default_value = "KILL")]
    signal: String,
    #[command(flatten)]
    names: Containers,
}

#[derive(clap::Args)]
pub(crate) struct RmArgs {
    /// Kill it if it runs
    #[arg(short, long)]
    force: bool,
    /// Remove its nameless volumes, too
    #[arg(short, long)]
    volumes: bool,
    /// Remove a link, OWNER/ALIAS, and not a container
    #[arg(short, long)]
    link: bool,
    #[command(flatten)]
    names: Containers,
}

pub(crate) async fn run(client: &Client, command: ContainerCommand) -> anyhow::Result<ExitCode> {
    let done = match command {
        ContainerCommand::Run(args) => return run_new(client, *args).await,
        ContainerCommand::Exec(args) => return exec(client, args).await,
        ContainerCommand::Attach(args) => return attach(client, &args).await,
        ContainerCommand::Start(args) => return start(client, &args).await,
        ContainerCommand::Stop(args) => return stop(client, &args, "stop").await,
        ContainerCommand::Restart(args) => return stop(client, &args, "restart").await,
        ContainerCommand::Kill(args) => return kill(client, &args).await,
        ContainerCommand::Pause(names) => return pause(client, &names, "pause").await,
        ContainerCommand::Unpause(names) => return pause(client, &names, "unpause").await,
        ContainerCommand::Update(args) => return update(client, &args).await,
        ContainerCommand::Rm(args) => return rm(client, &args).await,
        ContainerCommand::Create(args) => create(client, *args).await,
        ContainerCommand::Rename { container, name } => rename(client, &container, &name).await,
        ContainerCommand::Wait(names) => wait(client, &names).await,
        ContainerCommand::Top { container, options } => top(client, &container, &options.join(" ")).await,
        ContainerCommand::Port { container, port: only } => port(client, &container, only.as_deref()).await,
        ContainerCommand::Logs(args) => super::system::logs(client, args).await,
        ContainerCommand::Stats(args) => super::stats::stats(client, &args).await,
        ContainerCommand::Cp(args) => files::copy(client, &args).await,
        ContainerCommand::Diff { container } => files::diff(client, &container).await,
        ContainerCommand::Export { output, container } => files::export(client, &container, output.as_deref()).await,
        ContainerCommand::Commit(args) => files::commit(client, &args).await,
    };
    done.map(|()| ExitCode::SUCCESS)
}

pub(crate) async fn run_group(client: &Client, command: ContainerGroup) -> anyhow::Result<ExitCode> {
    let done = match command {
        ContainerGroup::Verb(command) => return run(client, command).await,
        ContainerGroup::Ls(args) => super::system::ps(client, args).await,
        ContainerGroup::Inspect(args) => inspect(client, &args, Some("container"), "").await,
        ContainerGroup::Prune(args) => prune::run(client, prune::CONTAINERS, &args).await,
    };
    done.map(|()| ExitCode::SUCCESS)
}

/// Makes a container; an image that is not here is pulled.
async fn make(client: &Client, args: &CreateArgs) -> anyhow::Result<String> {
    let (query, body) = create_body(args)?;
    if let Some(file) = args.cidfile.as_ref().filter(|file| file.exists()) {
        anyhow::bail!("{} is there already: remove it, or name another file for the container's id", file.display());
    }
    let path = format!("/containers/create?{query}");
    let fetch = || pull(client, &args.image, &args.platform, args.quiet);
    if args.pull == "always" {
        fetch().await?;
    }
    let made = match client.post(&path, &body).await {
        Err(error) if error.to_string().starts_with("No such image") && args.pull != "never" => {
            eprintln!("image {} is not here: pulling it", args.image);
            fetch().await?;
            client.post(&path, &body).await?
        }
        other => other?,
    };
    for warning in made["Warnings"].as_array().into_iter().flatten().filter_map(Value::as_str) {
        eprintln!("warning: {warning}");
    }
    let id = made["Id"].as_str().context("the daemon named no container")?;
    if let Some(file) = &args.cidfile {
        std::fs::write(file, id).with_context(|| format!("{} cannot be written", file.display()))?;
    }
    Ok(id.to_owned())
}

async fn create(client: &Client, args: CreateArgs) -> anyhow::Result<()> {
    line(&make(client, &args).await?)
}

async fn run_new(client: &Client, args: RunArgs) -> anyhow::Result<ExitCode> {
    let streams = args.create.streams(args.detach)?;
    if !args.detach {
        streams.check()?;
    }
    let id = make(client, &args.create).await?;
    let container = format!("/containers/{id}");
    if args.detach {
        client.post(&format!("{container}/start"), &json!({})).await?;
        line(&id)?;
        return Ok(ExitCode::SUCCESS);
    }
    let condition = if args.create.rm { "removed" } else { "next-exit" };
    start_attached(client, &container, &streams, &args.keys, condition).await
}

/// Joins a container, starts it, and waits for its end.
async fn start_attached(
    client: &Client,
    container: &str,
    streams: &Streams,
    keys: &KeysArgs,
    condition: &str,
) -> anyhow::Result<ExitCode> {
    let connection = client.upgrade(&attach_path(container, streams, keys), &json!({})).await?;
    let waiting = client.send(Method::POST, &format!("{container}/wait?condition={condition}"), None).await?;
    if let Err(error) = client.post(&format!("{container}/start"), &json!({})).await {
        // As shells have it: not found is 127, not to be run 126.
        eprintln!("skep: {error:#}");
        let code = if error.to_string().contains("not found") { 127 } else { 126 };
        return Ok(ExitCode::from(code));
    }
    follow(client, container, streams, keys, connection).await?;
    await_end(client, container, streams, waiting).await
}

/// The exit code of a process whose streams have ended: with the process, or since the user left it by
/// the detach keys.
async fn await_end(
    client: &Client,
    container: &str,
    streams: &Streams,
    waiting: Response<Incoming>,
) -> anyhow::Result<ExitCode> {
    let mut end = std::pin::pin!(read_json(waiting));
    let may_be_left = streams.tty && streams.interactive;
    loop {
        let limit = if may_be_left { END_LIMIT } else { std::time::Duration::MAX };
        if let Ok(end) = tokio::time::timeout(limit, &mut end).await {
            return Ok(exit_code(end?["StatusCode"].as_i64()));
        }
        let inspected = client.get(&format!("{container}/json")).await;
        if inspected.is_ok_and(|found| found["State"]["Running"] == true) {
            return Ok(ExitCode::SUCCESS);
        }
    }
}

fn attach_path(container: &str, streams: &Streams, keys: &KeysArgs) -> String {
    let [output, errors] = streams.outputs.map(u8::from);
    format!(
        "{container}/attach?stream=1&stdout={output}&stderr={errors}&stdin={}&detachKeys={}",
        u8::from(streams.interactive),
        escape(&keys.detach_keys)
    )
}

/// Copies a container's streams until they end; our signals are its own meanwhile.
async fn follow(
    client: &Client,
    container: &str,
    streams: &Streams,
    keys: &KeysArgs,
    connection: Upgraded,
) -> anyhow::Result<()> {
    if !keys.sig_proxy || streams.tty {
        return streams.pump(client, connection, container).await;
    }
    tokio::select! {
        pumped = streams.pump(client, connection, container) => pumped,
        failed = hand_signals_on(client, container) => failed,
    }
}

async fn exec(client: &Client, args: ExecArgs) -> anyhow::Result<ExitCode> {
    let streams = Streams::new(args.tty, args.interactive && !args.detach);
    streams.check()?;
    let env = environment(&[file_lines(&args.env_files)?, args.env].concat());
    let body = json!({
        "AttachStdin": streams.interactive, "AttachStdout": true, "AttachStderr": true, "Tty": args.tty,
        "Env": env, "Cmd": args.command, "User": args.user, "WorkingDir": args.workdir,
        "Privileged": args.privileged, "DetachKeys": args.detach_keys, "ConsoleSize": crate::streams::window(args.tty),
    });
    let made = client.post(&format!("/containers/{}/exec", escape(&args.container)), &body).await?;
    let exec = format!("/exec/{}", made["Id"].as_str().unwrap_or_default());
    let start = json!({"Detach": args.detach, "Tty": args.tty});
    if args.detach {
        client.post(&format!("{exec}/start"), &start).await?;
        return Ok(ExitCode::SUCCESS);
    }
    let connection = client.upgrade(&format!("{exec}/start"), &start).await?;
    streams.pump(client, connection, &exec).await?;
    Ok(exit_code(client.get(&format!("{exec}/json")).await?["ExitCode"].as_i64()))
}

async fn attach(client: &Client, args: &AttachArgs) -> anyhow::Result<ExitCode> {
    let path = format!("/containers/{}", escape(&args.container));
    let found = client.get(&format!("{path}/json")).await?;
    let running = found["State"]["Running"] == true;
    anyhow::ensure!(running, "container {} does not run: start it first", args.container);
    let is_on = |key: &str| found["Config"][key] == true;
    let streams = Streams::new(is_on("Tty"), is_on("OpenStdin") && !args.no_stdin);
    let connection = client.upgrade(&attach_path(&path, &streams, &args.keys), &json!({})).await?;
    let waiting = client.send(Method::POST, &format!("{path}/wait"), None).await?;
    follow(client, &path, &streams, &args.keys, connection).await?;
    await_end(client, &path, &streams, waiting).await
}

/// Does the same to each; goes on after an error, and fails if there was one.
async fn each(
    client: &Client,
    names: &Containers,
    method: Method,
    path: impl Fn(&str) -> String,
) -> anyhow::Result<ExitCode> {
    let mut code = ExitCode::SUCCESS;
    for name in &names.containers {
        match client.send(method.clone(), &path(&escape(name)), None).await {
            Ok(_) => line(name)?,
            Err(error) => {
                eprintln!("skep: {error:#}");
                code = ExitCode::FAILURE;
            }
        }
    }
    Ok(code)
}

async fn start(client: &Client, args: &StartArgs) -> anyhow::Result<ExitCode> {
    if !args.attach && !args.interactive {
        return each(client, &args.names, Method::POST, |name| format!("/containers/{name}/start")).await;
    }
    let [name] = args.names.containers.as_slice() else {
        anyhow::bail!("one container can be joined at a time: name one, or leave --attach out")
    };
    let path = format!("/containers/{}", escape(name));
    let found = client.get(&format!("{path}/json")).await?;
    let is_on = |key: &str| found["Config"][key] == true;
    let streams = Streams::new(is_on("Tty"), is_on("OpenStdin") && args.interactive);
    streams.check()?;
    start_attached(client, &path, &streams, &args.keys, "next-exit").await
}

async fn update(client: &Client, args: &UpdateArgs) -> anyhow::Result<ExitCode> {
    let mut body = json!({});
    args.limits.apply(&mut body)?;
    if let Some(policy) = &args.restart {
        body["RestartPolicy"] = restart_policy(policy)?;
    }
    anyhow::ensure!(body != json!({}), "nothing to change is named: give a limit or --restart");
    let mut code = ExitCode::SUCCESS;
    for name in &args.names.containers {
        match client.post(&format!("/containers/{}/update", escape(name)), &body).await {
            Ok(_) => line(name)?,
            Err(error) => {
                eprintln!("skep: {error:#}");
                code = ExitCode::FAILURE;
            }
        }
    }
    Ok(code)
}

async fn stop(client: &Client, args: &StopArgs, verb: &str) -> anyhow::Result<ExitCode> {
    let time = args.time.map(|time| format!("t={time}&")).unwrap_or_default();
    let signal = args.signal.as_ref().map(|signal| format!("signal={}", escape(signal))).unwrap_or_default();
    each(client, &args.names, Method::POST, |name| format!("/containers/{name}/{verb}?{time}{signal}")).await
}

async fn kill(client: &Client, args: &KillArgs) -> anyhow::Result<ExitCode> {
    let signal = escape(&args.signal);
    each(client, &args.names, Method::POST, |name| format!("/containers/{name}/kill?signal={signal}")).await
}

async fn pause(client: &Client, names: &Containers, verb: &str) -> anyhow::Result<ExitCode> {
    each(client, names, Method::POST, |name| format!("/containers/{name}/{verb}")).await
}

async fn rm(client: &Client, args: &RmArgs) -> anyhow::Result<ExitCode> {
    let options = format!("force={}&v={}&link={}", args.force, args.volumes, args.link);
    // Of a link's name, the slash is a part of the path.
    let path = |name: &str| if args.link { name.replace("%2F", "/") } else { name.to_owned() };
    each(client, &args.names, Method::DELETE, |name| format!("/containers/{}?{options}", path(name))).await
}

async fn rename(client: &Client, old: &str, new: &str) -> anyhow::Result<()> {
    let path = format!("/containers/{}/rename?name={}", escape(old), escape(new));
    client.post(&path, &json!({})).await.map(drop)
}

async fn wait(client: &Client, names: &Containers) -> anyhow::Result<()> {
    for name in &names.containers {
        let end = client.post(&format!("/containers/{}/wait", escape(name)), &json!({})).await?;
        line(&end["StatusCode"].to_string())?;
    }
    Ok(())
}

async fn top(client: &Client, container: &str, options: &str) -> anyhow::Result<()> {
    let query = if options.is_empty() { String::new() } else { format!("?ps_args={}", escape(options)) };
    let table = client.get(&format!("/containers/{}/top{query}", escape(container))).await?;
    let words = |row: &Value| {
        let cells = row.as_array().into_iter().flatten().filter_map(Value::as_str);
        cells.collect::<Vec<_>>().join("\t")
    };
    line(&words(&table["Titles"]))?;
    for row in table["Processes"].as_array().into_iter().flatten() {
        line(&words(row))?;
    }
    Ok(())
}

async fn port(client: &Client, container: &str, only: Option<&str>) -> anyhow::Result<()> {
    let found = client.get(&format!("/containers/{}/json", escape(container))).await?;
    let only = only.map(super::run::with_protocol);
    let mut shown = false;
    for (port, bindings) in found["NetworkSettings"]["Ports"].as_object().into_iter().flatten() {
        if only.as_ref().is_some_and(|only| only != port) {
            continue;
        }
        for binding in bindings.as_array().into_iter().flatten() {
            let text = |key: &str| binding[key].as_str().unwrap_or_default().to_owned();
            let front = if only.is_some() { String::new() } else { format!("{port} -> ") };
            line(&format!("{front}{}", socket(&text("HostIp"), &text("HostPort"))))?;
            shown = true;
        }
    }
    anyhow::ensure!(shown || only.is_none(), "container {container} does not publish {}", only.unwrap_or_default());
    Ok(())
}
