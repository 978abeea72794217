//! Containers of one host: `skep run`, `exec`, `rm` and so on.

use std::process::ExitCode;

use hyper::Method;
use serde_json::{Value, json};

use crate::client::{Client, escape, read_json};
use crate::commands::run::{CreateArgs, create_body};
use crate::commands::system::pull;
use crate::output::{FormatArg, line};
use crate::streams::{Streams, exit_code};

#[derive(clap::Args)]
pub(crate) struct RunArgs {
    /// Leave it running in the background and print its id
    #[arg(short, long)]
    detach: bool,
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
    containers: Vec<String>,
}

#[derive(clap::Args)]
pub(crate) struct StopArgs {
    /// Seconds before it is killed
    #[arg(short, long)]
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
    #[command(flatten)]
    names: Containers,
}

#[derive(clap::Args)]
pub(crate) struct InspectArgs {
    #[command(flatten)]
    names: Containers,
    #[command(flatten)]
    format: FormatArg,
}

/// Makes a container; an image that is not here is pulled.
async fn make(client: &Client, args: &CreateArgs) -> anyhow::Result<String> {
    let (query, body) = create_body(args)?;
    let path = format!("/containers/create?{query}");
    let made = match client.post(&path, &body).await {
        Err(error) if error.to_string().starts_with("No such image") && args.pull != "never" => {
            eprintln!("image {} is not here: pulling it", args.image);
            pull(client, &args.image).await?;
            client.post(&path, &body).await?
        }
        other => other?,
    };
    made["Id"].as_str().map(str::to_owned).ok_or_else(|| anyhow::anyhow!("the daemon named no container"))
}

pub(crate) async fn create(client: &Client, args: CreateArgs) -> anyhow::Result<()> {
    line(&make(client, &args).await?)
}

pub(crate) async fn run(client: &Client, args: RunArgs) -> anyhow::Result<ExitCode> {
    let streams = Streams { tty: args.create.tty, interactive: args.create.interactive && !args.detach };
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
    let attach = format!("{container}/attach?stream=1&stdout=1&stderr=1&stdin={}", u8::from(streams.interactive));
    let connection = client.upgrade(&attach, &json!({})).await?;
    let condition = if args.create.rm { "removed" } else { "next-exit" };
    let waiting = client.send(Method::POST, &format!("{container}/wait?condition={condition}"), None).await?;
    if let Err(error) = client.post(&format!("{container}/start"), &json!({})).await {
        // As shells have it: not found is 127, not to be run 126.
        eprintln!("skep: {error:#}");
        let code = if error.to_string().contains("not found") { 127 } else { 126 };
        return Ok(ExitCode::from(code));
    }
    streams.pump(client, connection, &container).await?;
    let end = read_json(waiting).await?;
    Ok(exit_code(end["StatusCode"].as_i64()))
}

pub(crate) async fn exec(client: &Client, args: ExecArgs) -> anyhow::Result<ExitCode> {
    let streams = Streams { tty: args.tty, interactive: args.interactive && !args.detach };
    streams.check()?;
    let body = json!({
        "AttachStdin": streams.interactive, "AttachStdout": true, "AttachStderr": true, "Tty": args.tty,
        "Env": super::run::environment(&args.env), "Cmd": args.command, "User": args.user,
        "WorkingDir": args.workdir, "Privileged": args.privileged,
    });
    let made = client.post(&format!("/containers/{}/exec", args.container), &body).await?;
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

pub(crate) async fn attach(client: &Client, container: &str) -> anyhow::Result<ExitCode> {
    let path = format!("/containers/{container}");
    let found = client.get(&format!("{path}/json")).await?;
    let running = found["State"]["Running"] == true;
    anyhow::ensure!(running, "container {container} does not run: start it first");
    let is_on = |key: &str| found["Config"][key] == true;
    let streams = Streams { tty: is_on("Tty"), interactive: is_on("OpenStdin") };
    let attach = format!("{path}/attach?stream=1&stdout=1&stderr=1&stdin={}", u8::from(streams.interactive));
    let connection = client.upgrade(&attach, &json!({})).await?;
    streams.pump(client, connection, &path).await?;
    let end = client.get(&format!("{path}/json")).await?;
    Ok(exit_code(end["State"]["ExitCode"].as_i64()))
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

pub(crate) async fn start(client: &Client, names: &Containers) -> anyhow::Result<ExitCode> {
    each(client, names, Method::POST, |name| format!("/containers/{name}/start")).await
}

pub(crate) async fn stop(client: &Client, args: &StopArgs, verb: &str) -> anyhow::Result<ExitCode> {
    let time = args.time.map(|time| format!("t={time}&")).unwrap_or_default();
    let signal = args.signal.as_ref().map(|signal| format!("signal={}", escape(signal))).unwrap_or_default();
    each(client, &args.names, Method::POST, |name| format!("/containers/{name}/{verb}?{time}{signal}")).await
}

pub(crate) async fn kill(client: &Client, args: &KillArgs) -> anyhow::Result<ExitCode> {
    let signal = escape(&args.signal);
    each(client, &args.names, Method::POST, |name| format!("/containers/{name}/kill?signal={signal}")).await
}

pub(crate) async fn pause(client: &Client, names: &Containers, verb: &str) -> anyhow::Result<ExitCode> {
    each(client, names, Method::POST, |name| format!("/containers/{name}/{verb}")).await
}

pub(crate) async fn rm(client: &Client, args: &RmArgs) -> anyhow::Result<ExitCode> {
    let options = format!("force={}&v={}", args.force, args.volumes);
    each(client, &args.names, Method::DELETE, |name| format!("/containers/{name}?{options}")).await
}

pub(crate) async fn rename(client: &Client, old: &str, new: &str) -> anyhow::Result<()> {
    let path = format!("/containers/{}/rename?name={}", escape(old), escape(new));
    client.post(&path, &json!({})).await.map(drop)
}

pub(crate) async fn wait(client: &Client, names: &Containers) -> anyhow::Result<()> {
    for name in &names.containers {
        let end = client.post(&format!("/containers/{}/wait", escape(name)), &json!({})).await?;
        line(&end["StatusCode"].to_string())?;
    }
    Ok(())
}

pub(crate) async fn inspect(client: &Client, args: &InspectArgs) -> anyhow::Result<()> {
    let mut found = Vec::new();
    for name in &args.names.containers {
        found.push(client.get(&format!("/containers/{}/json", escape(name))).await?);
    }
    args.format.print_all(&found)
}

pub(crate) async fn top(client: &Client, container: &str) -> anyhow::Result<()> {
    let table = client.get(&format!("/containers/{}/top", escape(container))).await?;
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

pub(crate) async fn port(client: &Client, container: &str) -> anyhow::Result<()> {
    let found = client.get(&format!("/containers/{}/json", escape(container))).await?;
    for (port, bindings) in found["NetworkSettings"]["Ports"].as_object().into_iter().flatten() {
        for binding in bindings.as_array().into_iter().flatten() {
            let text = |key: &str| binding[key].as_str().unwrap_or_default().to_owned();
            line(&format!("{port} -> {}:{}", text("HostIp"), text("HostPort")))?;
        }
    }
    Ok(())
}
