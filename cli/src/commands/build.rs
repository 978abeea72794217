//! `skep build`

use std::io::Read as _;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use base64::Engine as _;
use base64::prelude::{BASE64_STANDARD, BASE64_URL_SAFE};
use hyper::{Method, Request};
use serde_json::{Map, Value, json};

use super::image::{read_steps, show};
use super::stats::bytes;
use super::values::{size, ulimit};
use crate::client::{Client, escape};
use crate::credentials::Config;
use crate::output::line;
use crate::pipes::{Body, whole, written};

#[derive(clap::Args)]
pub(crate) struct BuildArgs {
    /// Name of the image (repeatable)
    #[arg(short, long = "tag", value_name = "NAME[:TAG]")]
    tags: Vec<String>,
    /// The Dockerfile's path within the context
    #[arg(short, long, default_value = "Dockerfile")]
    file: String,
    /// NAME=value, or the name of one of our own variables (repeatable)
    #[arg(long = "build-arg", value_name = "NAME[=VALUE]")]
    build_args: Vec<String>,
    #[arg(long = "label", value_name = "KEY=VALUE")]
    labels: Vec<String>,
    /// The stage to build
    #[arg(long, default_value = "")]
    target: String,
    #[arg(long)]
    no_cache: bool,
    /// Ask registries for base images though they are here
    #[arg(long)]
    pull: bool,
    /// Print the image's id alone
    #[arg(short, long)]
    quiet: bool,
    /// Write the image's id to a file
    #[arg(long, value_name = "FILE")]
    iidfile: Option<PathBuf>,
    /// Network of the steps: bridge, host, none, or a network's name
    #[arg(long, default_value = "")]
    network: String,
    /// NAME:IP for the steps' /etc/hosts (repeatable)
    #[arg(long = "add-host", value_name = "NAME:IP")]
    hosts: Vec<String>,
    /// OS[/ARCHITECTURE]
    #[arg(long, default_value = "")]
    platform: String,
    /// id=ID[,src=FILE|,env=NAME]: what RUN --mount=type=secret shows (repeatable)
    #[arg(long = "secret", value_name = "SECRET")]
    secrets: Vec<String>,
    /// Images whose layers alone count as cached (repeatable)
    #[arg(long, value_name = "IMAGE")]
    cache_from: Vec<String>,
    /// Of no effect: steps leave nothing behind
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", hide = true)]
    rm: Option<bool>,
    #[arg(long, hide = true)]
    force_rm: bool,
    #[arg(long, hide = true)]
    compress: bool,
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", hide = true)]
    disable_content_trust: Option<bool>,
    /// Memory that a step may use, such as 512m
    #[arg(short, long, value_name = "SIZE")]
    memory: Option<String>,
    /// Memory and swap together; -1 for no limit
    #[arg(long, value_name = "SIZE", allow_hyphen_values = true)]
    memory_swap: Option<String>,
    /// A step's weight among others
    #[arg(short, long, value_name = "N")]
    cpu_shares: Option<u64>,
    /// Microseconds
    #[arg(long, value_name = "N")]
    cpu_period: Option<u64>,
    /// Microseconds in each period
    #[arg(long, value_name = "N")]
    cpu_quota: Option<i64>,
    /// The CPUs that steps may run on, such as 0-1
    #[arg(long, value_name = "CPUS", default_value = "")]
    cpuset_cpus: String,
    #[arg(long, value_name = "NODES", default_value = "")]
    cpuset_mems: String,
    #[arg(long, value_name = "PATH", default_value = "")]
    cgroup_parent: String,
    /// Not supported: the daemon says why
    #[arg(long, value_name = "OPTION")]
    security_opt: Vec<String>,
    /// Not supported: the daemon says why
    #[arg(long)]
    squash: bool,
    #[arg(long, default_value = "", hide = true)]
    isolation: String,
    #[arg(long, value_name = "SIZE")]
    shm_size: Option<String>,
    /// NAME=SOFT[:HARD] (repeatable)
    #[arg(long = "ulimit", value_name = "ULIMIT")]
    ulimits: Vec<String>,
    /// Directory that holds what may be copied, - for an archive or a Dockerfile on standard input, or what the daemon
    /// fetches: the URL of an archive, of a Dockerfile, or of a git repository as URL#REFERENCE:DIRECTORY
    context: PathBuf,
}

/// KEY=VALUE pairs; a key alone has the value that our environment has for it, if any.
fn arguments(pairs: &[String]) -> Value {
    let pair = |text: &String| {
        let (key, value) =
            text.split_once('=').map_or((text.as_str(), None), |(key, value)| (key, Some(value.to_owned())));
        (key.to_owned(), json!(value.or_else(|| std::env::var(key).ok())))
    };
    Value::Object(pairs.iter().map(pair).collect::<Map<_, _>>())
}

/// What the daemon is asked for, but for the context.
fn query(args: &BuildArgs) -> anyhow::Result<String> {
    let ulimits: anyhow::Result<Vec<Value>> = args.ulimits.iter().map(|text| ulimit(text)).collect();
    let amount = |text: &Option<String>| match text.as_deref() {
        None => Ok("0".to_owned()),
        Some("-1") => Ok("-1".to_owned()),
        Some(text) => size(text).map(|bytes| bytes.to_string()),
    };
    let mut query = format!(
        "dockerfile={}&nocache={}&pull={}&q={}&target={}&buildargs={}&labels={}&networkmode={}&platform={}\
         &memory={}&memswap={}&shmsize={}&ulimits={}&squash={}",
        escape(&args.file),
        args.no_cache,
        args.pull,
        args.quiet,
        escape(&args.target),
        escape(&arguments(&args.build_args).to_string()),
        escape(&arguments(&args.labels).to_string()),
        escape(&args.network),
        escape(&args.platform),
        amount(&args.memory)?,
        amount(&args.memory_swap)?,
        amount(&args.shm_size)?,
        escape(&json!(ulimits?).to_string()),
        args.squash,
    );
    let number = |name: &str, number: Option<String>| number.map(|number| (name.to_owned(), number));
    let text = |name: &str, text: &String| Some((name.to_owned(), text.clone())).filter(|_| !text.is_empty());
    let list = |name: &str, list: &[String]| (!list.is_empty()).then(|| (name.to_owned(), json!(list).to_string()));
    for (name, value) in [
        number("cpushares", args.cpu_shares.map(|n| n.to_string())),
        number("cpuperiod", args.cpu_period.map(|n| n.to_string())),
        number("cpuquota", args.cpu_quota.map(|n| n.to_string())),
        text("cpusetcpus", &args.cpuset_cpus),
        text("cpusetmems", &args.cpuset_mems),
        text("cgroupparent", &args.cgroup_parent),
        text("isolation", &args.isolation),
        list("cachefrom", &args.cache_from),
        list("securityopt", &args.security_opt),
    ]
    .into_iter()
    .flatten()
    {
        query += &format!("&{name}={}", escape(&value));
    }
    for host in &args.hosts {
        query += &format!("&extrahosts={}", escape(host));
    }
    for tag in &args.tags {
        query += &format!("&t={}", escape(tag));
    }
    Ok(query)
}

pub(crate) async fn build(client: &Client, args: &BuildArgs) -> anyhow::Result<()> {
    let remote = args.context.to_str().filter(|context| is_remote(context));
    let context = if remote.is_some() { whole("") } else { pack(&args.context)? };
    let mut query = query(args)?;
    if let Some(remote) = remote {
        query += &format!("&remote={}", escape(remote));
    }
    let mut request = Request::builder()
        .method(Method::POST)
        .header("content-type", "application/x-tar")
        .header("x-registry-config", Config::header_for_build()?);
    if !args.secrets.is_empty() {
        request = request.header("x-skep-build-secrets", secrets(&args.secrets)?);
    }
    let mut id = None;
    let response = client.send_request(request, &format!("/build?{query}"), context).await?;
    read_steps(response, |step| {
        if let Some(told) = step["aux"]["ID"].as_str() {
            id = Some(told.to_owned());
        }
        show(step)
    })
    .await?;
    match (&args.iidfile, id) {
        (Some(path), Some(id)) => {
            std::fs::write(path, id).with_context(|| format!("{} cannot be written", path.display()))
        }
        _ => Ok(()),
    }
}

/// Secrets by id, as the daemon takes them.
fn secrets(given: &[String]) -> anyhow::Result<String> {
    /// What the daemon takes for all headers of a request.
    const LEN_MAX: usize = 200 << 10;
    let mut secrets = Map::new();
    for text in given {
        let read = |names: &[&str]| {
            let mut pairs = text.split(',').filter_map(|part| part.split_once('='));
            pairs.find(|(name, _)| names.contains(name)).map(|(_, value)| value)
        };
        let id = read(&["id"]).with_context(|| format!("secret {text:?} cannot be read: id=ID is missing"))?;
        let bytes = match (read(&["src", "source"]), read(&["env"])) {
            (Some(file), _) => std::fs::read(file).with_context(|| format!("secret {id}: {file} cannot be read"))?,
            (None, Some(name)) => {
                std::env::var(name).with_context(|| format!("secret {id}: variable {name} is not set"))?.into_bytes()
            }
            // As docker has it: the variable of that name, or else the file.
            (None, None) => match std::env::var(id) {
                Ok(value) => value.into_bytes(),
                Err(_) => std::fs::read(id).with_context(|| format!("secret {id}: it is no variable and no file"))?,
            },
        };
        secrets.insert(id.to_owned(), json!(BASE64_STANDARD.encode(bytes)));
    }
    let header = BASE64_URL_SAFE.encode(Value::Object(secrets).to_string());
    anyhow::ensure!(header.len() <= LEN_MAX, "the secrets are larger than {} KiB together", LEN_MAX >> 11);
    Ok(header)
}

/// Whether a context is for the daemon to fetch.
fn is_remote(context: &str) -> bool {
    ["http://", "https://", "git://", "ssh://", "git@", "github.com/"].iter().any(|start| context.starts_with(start))
        && !Path::new(context).is_dir()
}

/// The context as an archive; what `.dockerignore` names is left out by the daemon.
fn pack(dir: &Path) -> anyhow::Result<Body> {
    if dir == Path::new("-") {
        let mut input = Vec::new();
        std::io::stdin().read_to_end(&mut input)?;
        // An archive is known by its magic number; anything else is a Dockerfile.
        let compressed = [&[0x1f, 0x8b][..], b"BZh", &[0xfd, b'7', b'z'], &[0x28, 0xb5, 0x2f, 0xfd]];
        let is_archive =
            input.get(257..262) == Some(b"ustar") || compressed.iter().any(|magic| input.starts_with(magic));
        if is_archive {
            return Ok(whole(input));
        }
        let mut header = tar::Header::new_gnu();
        header.set_size(input.len() as u64);
        header.set_mode(0o644);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(0);
        let mut tar = tar::Builder::new(Vec::new());
        tar.append_data(&mut header, "Dockerfile", input.as_slice())?;
        return Ok(whole(tar.into_inner()?));
    }
    anyhow::ensure!(dir.is_dir(), "context {} is no directory", dir.display());
    let dir = dir.to_owned();
    Ok(written(move |to| {
        let mut tar = tar::Builder::new(to);
        tar.follow_symlinks(false);
        tar.append_dir_all(".", &dir).with_context(|| format!("context {} cannot be read", dir.display()))?;
        Ok(tar.finish()?)
    }))
}

/// `skep builder …`
#[derive(clap::Subcommand)]
pub(crate) enum BuilderCommand {
    /// Build an image from a Dockerfile
    Build(Box<BuildArgs>),
    /// Remove what builds have left that no image has
    Prune {
        /// Of no effect: all of it goes
        #[arg(short, long, hide = true)]
        all: bool,
        #[arg(short, long, hide = true)]
        force: bool,
        #[arg(long, hide = true)]
        filter: Vec<String>,
        #[arg(long, hide = true)]
        keep_storage: Option<String>,
    },
}

pub(crate) async fn run_builder(client: &Client, command: BuilderCommand) -> anyhow::Result<()> {
    match command {
        BuilderCommand::Build(args) => build(client, &args).await,
        BuilderCommand::Prune { .. } => {
            let pruned = client.post("/build/prune", &json!({})).await?;
            let freed = pruned["SpaceReclaimed"].as_f64().unwrap_or_default();
            line(&format!("Total reclaimed space: {}", bytes(freed)))
        }
    }
}
