//! This host: its containers, images, and the daemon itself.

use std::io::{IsTerminal as _, Read as _, Write as _};

use http_body_util::BodyExt as _;
use hyper::Method;
use serde_json::{Value, json};
use tokio::io::AsyncWriteExt as _;

use super::prune::PruneSystemArgs;
use super::stats::bytes;
use super::values::duration;
use crate::client::{Client, escape};
use crate::credentials::{Config, registry_name};
use crate::output::{FormatArg, ListArgs, age, filters, line, socket};

/// `skep system …`
#[derive(clap::Subcommand)]
pub(crate) enum SystemCommand {
    /// Say what this host and its swarm are
    Info(FormatArg),
    /// Tell what happens
    Events(EventsArgs),
    /// Show what takes space
    Df {
        /// Each image, container and volume
        #[arg(short, long, conflicts_with = "format")]
        verbose: bool,
        #[command(flatten)]
        format: FormatArg,
    },
    /// Remove what nobody uses
    Prune(PruneSystemArgs),
    /// Carry bytes between the daemon and whoever runs this, such as a client that came by SSH
    #[command(hide = true)]
    DialStdio,
}

#[derive(clap::Args)]
pub(crate) struct EventsArgs {
    /// What happened before, too: RFC 3339, seconds since 1970, or a time ago such as 10m
    #[arg(long, default_value = "")]
    since: String,
    /// Only until then
    #[arg(long, default_value = "")]
    until: String,
    /// Only what matches: KEY=VALUE (repeatable)
    #[arg(short, long, value_name = "KEY=VALUE")]
    filter: Vec<String>,
    /// json, or a template such as '{{.Type}} {{.Action}}'
    #[arg(long, value_name = "FORMAT")]
    format: Option<String>,
}

#[derive(clap::Args)]
pub(crate) struct LoginArgs {
    #[arg(short, long)]
    username: Option<String>,
    #[arg(short, long)]
    password: Option<String>,
    /// Read the password from standard input
    #[arg(long, conflicts_with = "password")]
    password_stdin: bool,
    /// [default: docker's own]
    #[arg(default_value = "")]
    server: String,
}

#[derive(clap::Args)]
pub(crate) struct PsArgs {
    /// Those that have ended, too
    #[arg(short, long)]
    all: bool,
    /// The last so many that were made, whether they run or not
    #[arg(short = 'n', long, value_name = "N", default_value_t = 0, hide_default_value = true)]
    last: u32,
    /// The one that was made last
    #[arg(short, long)]
    latest: bool,
    /// Show ids and commands in full
    #[arg(long)]
    no_trunc: bool,
    /// Count the bytes of their files, too
    #[arg(short, long)]
    size: bool,
    #[command(flatten)]
    list: ListArgs,
}

#[derive(clap::Args)]
pub(crate) struct LogsArgs {
    #[command(flatten)]
    options: LogOptions,
    container: String,
}

/// Which output to show; shared by all that show output.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct LogOptions {
    /// Go on with what comes
    #[arg(short, long)]
    follow: bool,
    /// Show when each line was written
    #[arg(short, long)]
    timestamps: bool,
    /// Only the last so many lines
    #[arg(short = 'n', long, default_value = "all")]
    tail: String,
    /// Only what is younger: RFC 3339 or seconds since 1970
    #[arg(long, default_value = "")]
    since: String,
    /// Only what is older
    #[arg(long, default_value = "")]
    until: String,
    /// Show the labels and variables that the log driver was told to keep, too
    #[arg(long)]
    pub(crate) details: bool,
}

impl LogOptions {
    pub(crate) fn query(&self) -> String {
        format!(
            "stdout=1&stderr=1&follow={}&timestamps={}&tail={}&since={}&until={}",
            self.follow,
            self.timestamps,
            escape(&self.tail),
            escape(&point_in_time(&self.since)),
            escape(&point_in_time(&self.until))
        )
    }
}

/// Prints frames of output as they come; `prefix` makes the front of each line from its details.
pub(crate) async fn print_frames(
    client: &Client,
    path: &str,
    prefix: impl Fn(&str) -> Option<(String, String)>,
) -> anyhow::Result<()> {
    let response = client.send(Method::GET, path, None).await?;
    let raw = response.headers().get("content-type").is_some_and(|kind| kind == "application/vnd.docker.raw-stream");
    let mut body = response.into_body();
    let mut buffer: Vec<u8> = Vec::new();
    while let Some(frame) = body.frame().await {
        let Ok(data) = frame?.into_data() else { continue };
        buffer.extend_from_slice(&data);
        while let Some(piece) = if raw { first_line(&buffer) } else { first_frame(&buffer) } {
            let text = String::from_utf8_lossy(&buffer[piece.clone()]).into_owned();
            let text = prefix(&text).map_or(text, |(front, rest)| format!("{front}{rest}"));
            let written = if !raw && buffer[0] == 2 {
                std::io::stderr().write_all(text.as_bytes())
            } else {
                std::io::stdout().write_all(text.as_bytes()).and_then(|()| std::io::stdout().flush())
            };
            if written.is_err() {
                return Ok(());
            }
            buffer.drain(..piece.end);
        }
    }
    Ok(())
}

/// Where the text of the first whole frame lies.
fn first_frame(buffer: &[u8]) -> Option<std::ops::Range<usize>> {
    let (header, rest) = buffer.split_first_chunk::<8>()?;
    let [.., a, b, c, d] = *header;
    let len = usize::try_from(u32::from_be_bytes([a, b, c, d])).ok()?;
    (rest.len() >= len).then_some(8..8 + len)
}

/// The first whole line of what a terminal showed.
fn first_line(buffer: &[u8]) -> Option<std::ops::Range<usize>> {
    Some(0..buffer.iter().position(|&byte| byte == b'\n')? + 1)
}

pub(crate) async fn logs(client: &Client, args: LogsArgs) -> anyhow::Result<()> {
    let path = format!("/containers/{}", escape(&args.container));
    let query = format!("{path}/logs?details={}&{}", args.options.details, args.options.query());
    if client.get(&format!("{path}/json")).await?["Config"]["Tty"] == true {
        // A terminal has one stream, as it is.
        return super::files::write_body(client.send(Method::GET, &query, None).await?, &mut std::io::stdout()).await;
    }
    print_frames(client, &query, |_| None).await
}

pub(crate) async fn ps(client: &Client, args: PsArgs) -> anyhow::Result<()> {
    let last = if args.latest { 1 } else { args.last };
    let all = args.all || last > 0;
    let path = format!("/containers/json?all={all}&limit={last}&size={}&{}", args.size, args.list.query()?);
    let containers = client.get(&path).await?;
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let row = |container: &Value| {
        let id = text(&container["Id"]);
        let command = text(&container["Command"]);
        let short: String = command.chars().take(20).collect();
        let ports = container["Ports"].as_array().into_iter().flatten().map(|port| {
            let inner = format!("{}/{}", port["PrivatePort"], text(&port["Type"]));
            match port["PublicPort"].as_u64() {
                Some(public) => format!("{}->{inner}", socket(&text(&port["IP"]), &public.to_string())),
                None => inner,
            }
        });
        json!({
            "ID": if args.no_trunc { &id } else { &id[..id.len().min(12)] }, "Image": container["Image"],
            "Command": if args.no_trunc || short.len() == command.len() { command.clone() } else { short + "…" },
            "CreatedAt": container["Created"], "RunningFor": age(container["Created"].as_u64().unwrap_or(0)),
            "Status": container["Status"], "State": container["State"],
            "Ports": ports.collect::<Vec<_>>().join(", "), "Labels": container["Labels"],
            "Size": bytes(container["SizeRw"].as_f64().unwrap_or(0.0)),
            "Names": text(&container["Names"][0]).trim_start_matches('/'),
        })
    };
    let rows: Vec<_> = containers.as_array().into_iter().flatten().map(row).collect();
    let columns = [
        ("ID", "CONTAINER ID"),
        ("Image", "IMAGE"),
        ("Command", "COMMAND"),
        ("RunningFor", "CREATED"),
        ("Status", "STATUS"),
        ("Ports", "PORTS"),
        ("Names", "NAMES"),
        ("Size", "SIZE"),
    ];
    args.list.print(&columns[..columns.len() - usize::from(!args.size)], &rows)
}

pub(crate) async fn run(client: &Client, command: SystemCommand) -> anyhow::Result<()> {
    match command {
        SystemCommand::Info(format) => info(client, format).await,
        SystemCommand::Events(args) => events(client, &args).await,
        SystemCommand::Df { verbose, format } => df(client, verbose, &format).await,
        SystemCommand::Prune(args) => super::prune::run_system(client, &args).await,
        SystemCommand::DialStdio => dial_stdio(client).await,
    }
}

/// Ends with what the daemon has to say, which may come long after the other side has said all.
async fn dial_stdio(client: &Client) -> anyhow::Result<()> {
    let (mut from_daemon, mut to_daemon) = tokio::io::split(client.dial().await?);
    let asking = tokio::spawn(async move {
        drop(tokio::io::copy(&mut tokio::io::stdin(), &mut to_daemon).await);
        drop(to_daemon.shutdown().await);
    });
    let mut out = tokio::io::stdout();
    tokio::io::copy(&mut from_daemon, &mut out).await?;
    out.flush().await?;
    asking.abort();
    Ok(())
}

pub(crate) async fn events(client: &Client, args: &EventsArgs) -> anyhow::Result<()> {
    let filters = filters(&args.filter)?.to_string();
    let path = format!(
        "/events?since={}&until={}&filters={}",
        escape(&point_in_time(&args.since)),
        escape(&point_in_time(&args.until)),
        escape(&filters)
    );
    let answer = client.send(Method::GET, &path, None).await?;
    super::image::read_steps(answer, |event| match args.format.as_deref() {
        None => line(&event_line(event)),
        Some(format) => FormatArg { format: Some(format.to_owned()) }.print(event),
    })
    .await
}

/// `10m` is that long ago; everything else is told as it is.
fn point_in_time(text: &str) -> String {
    let Ok(ago) = duration(text) else { return text.to_owned() };
    let then = jiff::Timestamp::now().as_nanosecond() - i128::from(ago);
    format!("{}.{:09}", then / 1_000_000_000, then % 1_000_000_000)
}

fn event_line(event: &Value) -> String {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let at = event["timeNano"].as_i64().and_then(|at| jiff::Timestamp::from_nanosecond(at.into()).ok());
    let attributes = event["Actor"]["Attributes"].as_object().into_iter().flatten();
    let attributes: Vec<_> = attributes.map(|(key, value)| format!("{key}={}", text(value))).collect();
    format!(
        "{} {} {} {} ({})",
        at.map(|at| at.to_string()).unwrap_or_default(),
        text(&event["Type"]),
        text(&event["Action"]),
        text(&event["Actor"]["ID"]),
        attributes.join(", ")
    )
}

fn size_of(value: &Value) -> &Value {
    &value["Size"]
}

fn written_of(container: &Value) -> &Value {
    &container["SizeRw"]
}

fn held_of(volume: &Value) -> &Value {
    &volume["UsageData"]["Size"]
}

async fn df(client: &Client, verbose: bool, format: &FormatArg) -> anyhow::Result<()> {
    let used = client.get("/system/df").await?;
    if format.format.is_some() {
        return format.print(&used);
    }
    if verbose {
        return df_verbose(&used);
    }
    let list = |key: &str| used[key].as_array().map_or(&[][..], Vec::as_slice);
    let sum = |list: &[Value], size: &dyn Fn(&Value) -> &Value| {
        list.iter().filter_map(|v| size(v).as_f64()).fold(0.0, |sum, size| sum + size.max(0.0))
    };
    let row = |kind: &str, list: &[Value], active: &dyn Fn(&Value) -> bool, size: &dyn Fn(&Value) -> &Value, total| {
        let free: Vec<Value> = list.iter().filter(|value| !active(value)).cloned().collect();
        json!({
            "Type": kind, "TotalCount": list.len(), "Active": list.len() - free.len(), "Size": bytes(total),
            "Reclaimable": bytes(sum(&free, size).min(total)),
        })
    };
    let (images, containers) = (list("Images"), list("Containers"));
    let (volumes, builds) = (list("Volumes"), list("BuildCache"));
    let has = |value: &Value| value.as_i64().is_some_and(|count| count > 0);
    let layers = used["LayersSize"].as_f64().unwrap_or(0.0);
    let rows = [
        row("Images", images, &|v| has(&v["Containers"]), &size_of, layers),
        row("Containers", containers, &|v| v["State"] == "running", &written_of, sum(containers, &written_of)),
        row("Local Volumes", volumes, &|v| has(&v["UsageData"]["RefCount"]), &held_of, sum(volumes, &held_of)),
        row("Build Cache", builds, &|v| v["InUse"] == true, &size_of, sum(builds, &size_of)),
    ];
    let columns = [
        ("Type", "TYPE"),
        ("TotalCount", "TOTAL"),
        ("Active", "ACTIVE"),
        ("Size", "SIZE"),
        ("Reclaimable", "RECLAIMABLE"),
    ];
    ListArgs::default().print(&columns, &rows)
}

/// Each image, container and volume, and what it takes.
fn df_verbose(used: &Value) -> anyhow::Result<()> {
    let size = |value: &Value| bytes(value.as_f64().unwrap_or(0.0).max(0.0));
    let short = |id: &Value| {
        let id = id.as_str().unwrap_or_default().trim_start_matches("sha256:");
        id.chars().take(12).collect::<String>()
    };
    let rows = |key: &str, row: &dyn Fn(&Value) -> Value| -> Vec<Value> {
        used[key].as_array().into_iter().flatten().map(row).collect()
    };
    let table = |title: &str, columns: &[(&str, &str)], rows: &[Value]| {
        line(&format!("{title} space usage:\n"))?;
        ListArgs::default().print(columns, rows)?;
        line("")
    };
    let images = rows("Images", &|image| {
        let created = age(image["Created"].as_u64().unwrap_or(0));
        json!({"Name": image["RepoTags"][0].as_str().unwrap_or("<none>"), "ID": short(&image["Id"]), "Created": created,
            "Size": size(&image["Size"]), "Shared": size(&image["SharedSize"]), "Containers": image["Containers"]})
    });
    let columns = [("Name", "IMAGE"), ("ID", "IMAGE ID"), ("Created", "CREATED"), ("Size", "SIZE")];
    table("Images", &[&columns[..], &[("Shared", "SHARED SIZE"), ("Containers", "CONTAINERS")]].concat(), &images)?;
    let containers = rows("Containers", &|container| {
        let name = container["Names"][0].as_str().unwrap_or_default().trim_start_matches('/');
        json!({"ID": short(&container["Id"]), "Image": container["Image"], "Size": size(&container["SizeRw"]),
            "Status": container["Status"], "Name": name})
    });
    let columns =
        [("ID", "CONTAINER ID"), ("Image", "IMAGE"), ("Size", "SIZE"), ("Status", "STATUS"), ("Name", "NAMES")];
    table("Containers", &columns, &containers)?;
    let volumes = rows("Volumes", &|volume| {
        json!({"Name": volume["Name"], "Links": volume["UsageData"]["RefCount"],
            "Size": size(&volume["UsageData"]["Size"])})
    });
    table("Local Volumes", &[("Name", "VOLUME NAME"), ("Links", "LINKS"), ("Size", "SIZE")], &volumes)
}

/// Logs in where the daemon says that it is right, and keeps what that takes as docker does.
pub(crate) async fn login(client: &Client, args: LoginArgs) -> anyhow::Result<()> {
    let registry = registry_name(&args.server);
    let terminal = console::Term::stderr();
    let ask = |what: &str| -> anyhow::Result<()> {
        anyhow::ensure!(
            std::io::stdin().is_terminal(),
            "{what} is missing: give it by its flag, nobody can be asked here"
        );
        Ok(terminal.write_str(&format!("{what} for {registry}: "))?)
    };
    let username = match args.username {
        Some(username) => username,
        None => {
            ask("username")?;
            terminal.read_line()?
        }
    };
    let password = match args.password {
        Some(password) => password,
        None if args.password_stdin => {
            let mut password = String::new();
            std::io::stdin().read_to_string(&mut password)?;
            password.trim_end_matches(['\r', '\n']).to_owned()
        }
        None => {
            ask("password")?;
            terminal.read_secure_line()?
        }
    };
    let auth = json!({"username": username, "password": password, "serveraddress": registry});
    let answer = client.post("/auth", &auth).await?;
    let kept = json!({"username": username, "password": password, "identitytoken": answer["IdentityToken"]});
    if Config::load()?.keep(&registry, &kept)? {
        eprintln!("the credentials lie unencrypted in docker's config.json: a credential helper would keep them safer");
    }
    line(answer["Status"].as_str().unwrap_or("Login Succeeded"))
}

pub(crate) fn logout(server: &str) -> anyhow::Result<()> {
    let registry = registry_name(server);
    let known = Config::load()?.forget(&registry)?;
    line(&if known { format!("Removed the credentials of {registry}") } else { format!("Not logged in to {registry}") })
}

pub(crate) async fn info(client: &Client, format: FormatArg) -> anyhow::Result<()> {
    let info = client.get("/info").await?;
    if format.format.is_some() {
        return format.print(&info);
    }
    let swarm = &info["Swarm"];
    for (name, value) in [
        ("Name", &info["Name"]),
        ("Version", &info["ServerVersion"]),
        ("Kernel", &info["KernelVersion"]),
        ("Operating system", &info["OperatingSystem"]),
        ("CPUs", &info["NCPU"]),
        ("Memory (bytes)", &info["MemTotal"]),
        ("Data root", &info["DockerRootDir"]),
        ("Containers", &info["Containers"]),
        ("Running", &info["ContainersRunning"]),
        ("Images", &info["Images"]),
        ("Swarm", &swarm["LocalNodeState"]),
        ("Node id", &swarm["NodeID"]),
        ("Manager", &swarm["ControlAvailable"]),
    ] {
        let value = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        line(&format!("{name:<18} {value}"))?;
    }
    if let Some(error) = swarm["Error"].as_str().filter(|error| !error.is_empty()) {
        line(&format!("{:<18} {error}", "Swarm error"))?;
    }
    Ok(())
}

pub(crate) async fn version(client: &Client, format: FormatArg) -> anyhow::Result<()> {
    let server = client.get("/version").await;
    let client_version = env!("CARGO_PKG_VERSION");
    if format.format.is_some() {
        return format.print(&json!({"Client": {"Version": client_version}, "Server": server?}));
    }
    line(&format!("Client: {client_version}"))?;
    let server = server?;
    line(&format!(
        "Server: {} (API {})",
        server["Version"].as_str().unwrap_or("?"),
        server["ApiVersion"].as_str().unwrap_or("?")
    ))
}
