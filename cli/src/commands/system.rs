//! This host: its containers, images, and the daemon itself.

use std::io::Write as _;

use http_body_util::BodyExt as _;
use hyper::Method;
use serde_json::{Value, json};

use crate::client::{Client, escape};
use crate::output::{FormatArg, ListArgs, line};

#[derive(clap::Args)]
pub(crate) struct PsArgs {
    /// Those that have ended, too
    #[arg(short, long)]
    all: bool,
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
}

impl LogOptions {
    pub(crate) fn query(&self) -> String {
        format!(
            "stdout=1&stderr=1&follow={}&timestamps={}&tail={}&since={}",
            self.follow,
            self.timestamps,
            escape(&self.tail),
            escape(&self.since)
        )
    }
}

/// Prints frames of output as they come; `prefix` makes the front of each line from its details.
pub(crate) async fn print_frames(
    client: &Client,
    path: &str,
    prefix: impl Fn(&str) -> Option<(String, String)>,
) -> anyhow::Result<()> {
    let mut body = client.send(Method::GET, path, None).await?.into_body();
    let mut buffer: Vec<u8> = Vec::new();
    while let Some(frame) = body.frame().await {
        let Ok(data) = frame?.into_data() else { continue };
        buffer.extend_from_slice(&data);
        while buffer.len() >= 8 {
            let len = usize::try_from(u32::from_be_bytes([buffer[4], buffer[5], buffer[6], buffer[7]]))?;
            if buffer.len() < 8 + len {
                break;
            }
            let text = String::from_utf8_lossy(&buffer[8..8 + len]).into_owned();
            let text = prefix(&text).map_or(text, |(front, rest)| format!("{front}{rest}"));
            let written = if buffer[0] == 2 {
                std::io::stderr().write_all(text.as_bytes())
            } else {
                std::io::stdout().write_all(text.as_bytes()).and_then(|()| std::io::stdout().flush())
            };
            if written.is_err() {
                return Ok(());
            }
            buffer.drain(..8 + len);
        }
    }
    Ok(())
}

pub(crate) async fn logs(client: &Client, args: LogsArgs) -> anyhow::Result<()> {
    print_frames(client, &format!("/containers/{}/logs?{}", args.container, args.options.query()), |_| None).await
}

pub(crate) async fn ps(client: &Client, args: PsArgs) -> anyhow::Result<()> {
    let containers = client.get(&format!("/containers/json?all={}&{}", args.all, args.list.query()?)).await?;
    let row = |container: &Value| {
        let id = container["Id"].as_str().unwrap_or_default();
        json!({
            "ID": &id[..id.len().min(12)], "Image": container["Image"], "Command": container["Command"],
            "Status": container["Status"], "State": container["State"],
            "Names": container["Names"][0].as_str().unwrap_or_default().trim_start_matches('/'),
        })
    };
    let rows: Vec<_> = containers.as_array().into_iter().flatten().map(row).collect();
    let columns = [("ID", "CONTAINER ID"), ("Image", "IMAGE"), ("Status", "STATUS"), ("Names", "NAMES")];
    args.list.print(&columns, &rows)
}

pub(crate) async fn images(client: &Client, args: ListArgs) -> anyhow::Result<()> {
    let images = client.get("/images/json").await?;
    let row = |image: &Value| {
        let id = image["Id"].as_str().unwrap_or_default().trim_start_matches("sha256:");
        let tag = image["RepoTags"][0].as_str().unwrap_or("<none>:<none>");
        let (repository, tag) = tag.rsplit_once(':').unwrap_or((tag, ""));
        let size = format!("{:.1} MB", image["Size"].as_f64().unwrap_or_default() / 1e6);
        json!({"ID": &id[..id.len().min(12)], "Repository": repository, "Tag": tag, "Size": size})
    };
    let rows: Vec<_> = images.as_array().into_iter().flatten().map(row).collect();
    args.print(&[("Repository", "REPOSITORY"), ("Tag", "TAG"), ("ID", "IMAGE ID"), ("Size", "SIZE")], &rows)
}

pub(crate) async fn pull(client: &Client, image: &str) -> anyhow::Result<()> {
    let path = format!("/images/create?fromImage={}", escape(image));
    crate::commands::image::progress(client.send(Method::POST, &path, None).await?).await
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
