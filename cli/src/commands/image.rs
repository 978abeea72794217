//! Images of one host: `skep build`, `push`, `tag` and so on.

use std::io::{Read as _, Write as _};
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use hyper::{Method, Request, Response};
use serde_json::{Map, Value, json};

use super::container::{InspectArgs, inspect};
use super::files::write_to;
use super::prune::{self, PruneAllArgs};
use super::values::{size, ulimit};
use crate::client::{Client, escape};
use crate::credentials::Config;
use crate::output::{ListArgs, age, line};
use crate::pipes::{Body, whole, written};

/// What is done to images; each verb stands alone, and behind `skep image`.
#[derive(clap::Subcommand)]
pub(crate) enum ImageCommand {
    /// Fetch an image from its registry
    Pull(PullArgs),
    /// Send an image to its registry
    Push(PushArgs),
    /// Build an image from a Dockerfile
    Build(Box<BuildArgs>),
    /// Give an image one more name
    Tag { image: String, name: String },
    /// Write images to an archive
    Save {
        /// [default: standard output]
        #[arg(short, long, value_name = "FILE")]
        output: Option<PathBuf>,
        #[arg(required = true)]
        images: Vec<String>,
    },
    /// Read images from an archive
    Load {
        /// [default: standard input]
        #[arg(short, long, value_name = "FILE")]
        input: Option<PathBuf>,
        /// Show no progress
        #[arg(short, long)]
        quiet: bool,
    },
    /// Show how an image came to be
    History {
        #[command(flatten)]
        list: ListArgs,
        image: String,
    },
    /// Make an image of an archive of files
    Import {
        #[arg(short, long, default_value = "")]
        message: String,
        /// An instruction of a Dockerfile, such as CMD ["sh"] (repeatable)
        #[arg(short, long = "change", value_name = "INSTRUCTION")]
        changes: Vec<String>,
        /// A file, or - for standard input
        file: PathBuf,
        /// Name of the image
        #[arg(default_value = "")]
        image: String,
    },
}

/// `skep image …`
#[derive(clap::Subcommand)]
pub(crate) enum ImageGroup {
    #[command(flatten)]
    Verb(ImageCommand),
    /// List this host's images
    #[command(visible_alias = "list")]
    Ls(ImagesArgs),
    /// Show images in full
    Inspect(InspectArgs),
    /// Remove images
    Rm(RemoveArgs),
    /// Remove nameless images that nobody uses
    Prune(PruneAllArgs),
}

#[derive(clap::Args)]
pub(crate) struct ImagesArgs {
    /// Those that only others stand on, too
    #[arg(short, long)]
    all: bool,
    /// Show digests
    #[arg(long)]
    digests: bool,
    /// Show ids in full
    #[arg(long)]
    no_trunc: bool,
    #[command(flatten)]
    list: ListArgs,
    /// Only those called so
    repository: Option<String>,
}

#[derive(clap::Args)]
pub(crate) struct RemoveArgs {
    /// Remove though it has more names or containers
    #[arg(short, long)]
    force: bool,
    #[arg(required = true)]
    images: Vec<String>,
}

#[derive(clap::Args)]
pub(crate) struct PullArgs {
    /// Every tag of the repository
    #[arg(short, long)]
    all_tags: bool,
    /// OS[/ARCHITECTURE]
    #[arg(long, default_value = "")]
    platform: String,
    /// Show no progress
    #[arg(short, long)]
    quiet: bool,
    image: String,
}

#[derive(clap::Args)]
pub(crate) struct PushArgs {
    /// Every tag of the repository that is here
    #[arg(short, long)]
    all_tags: bool,
    /// Show no progress
    #[arg(short, long)]
    quiet: bool,
    image: String,
}

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
    /// Keep nothing of steps, which is always so
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", hide = true)]
    rm: Option<bool>,
    #[arg(long, hide = true)]
    force_rm: bool,
    /// Memory that a step may use, such as 512m
    #[arg(short, long, value_name = "SIZE")]
    memory: Option<String>,
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

pub(crate) async fn run(client: &Client, command: ImageCommand) -> anyhow::Result<()> {
    match command {
        ImageCommand::Pull(args) if args.all_tags => {
            let path = format!("/images/create?fromImage={}&allTags=true", escape(&args.image));
            fetch(client, &path, &args.image, args.quiet).await
        }
        ImageCommand::Pull(args) => pull(client, &args.image, &args.platform, args.quiet).await,
        ImageCommand::Push(args) => push(client, &args).await,
        ImageCommand::Build(args) => build(client, &args).await,
        ImageCommand::Tag { image, name } => {
            client.post(&format!("/images/{image}/tag?repo={}", escape(&name)), &json!({})).await.map(drop)
        }
        ImageCommand::Save { output, images } => save(client, &images, output.as_deref()).await,
        ImageCommand::Load { input, quiet } => load(client, input.as_deref(), quiet).await,
        ImageCommand::History { list, image } => history(client, &list, &image).await,
        ImageCommand::Import { message, changes, file, image } => {
            let mut query = format!("fromSrc=-&repo={}&message={}", escape(&image), escape(&message));
            changes.iter().for_each(|change| query += &format!("&changes={}", escape(change)));
            let archive = read(Some(&file).filter(|file| file.as_os_str() != "-").map(PathBuf::as_path))?;
            let path = format!("/images/create?{query}");
            progress(client.send_archive(&path, archive).await?).await
        }
    }
}

pub(crate) async fn run_group(client: &Client, command: ImageGroup) -> anyhow::Result<()> {
    match command {
        ImageGroup::Verb(command) => run(client, command).await,
        ImageGroup::Ls(args) => list(client, &args).await,
        ImageGroup::Inspect(args) => inspect(client, &args, Some("image")).await,
        ImageGroup::Rm(args) => remove(client, &args).await,
        ImageGroup::Prune(args) => prune::run_images(client, &args).await,
    }
}

pub(crate) async fn list(client: &Client, args: &ImagesArgs) -> anyhow::Result<()> {
    let mut filters = args.list.filters()?;
    if let Some(repository) = &args.repository {
        filters["reference"] = json!([repository]);
    }
    let path = format!("/images/json?all={}&digests=true&filters={}", args.all, escape(&filters.to_string()));
    let images = client.get(&path).await?;
    let mut rows = Vec::new();
    for image in images.as_array().into_iter().flatten() {
        let id = image["Id"].as_str().unwrap_or_default();
        let short = id.trim_start_matches("sha256:");
        let names: Vec<&str> = image["RepoTags"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
        let digest = image["RepoDigests"][0].as_str().and_then(|digest| digest.split('@').nth(1)).unwrap_or("<none>");
        for name in if names.is_empty() { vec!["<none>:<none>"] } else { names } {
            let (repository, tag) = name.rsplit_once(':').unwrap_or((name, ""));
            rows.push(json!({
                "ID": if args.no_trunc { id } else { &short[..short.len().min(12)] },
                "Repository": repository, "Tag": tag, "Digest": digest,
                "CreatedSince": age(image["Created"].as_u64().unwrap_or(0)),
                "Size": format!("{:.1} MB", image["Size"].as_f64().unwrap_or_default() / 1e6),
            }));
        }
    }
    let columns = [
        ("Repository", "REPOSITORY"),
        ("Tag", "TAG"),
        ("Digest", "DIGEST"),
        ("ID", "IMAGE ID"),
        ("CreatedSince", "CREATED"),
        ("Size", "SIZE"),
    ];
    let columns: Vec<_> = columns.into_iter().filter(|(key, _)| args.digests || *key != "Digest").collect();
    args.list.print(&columns, &rows)
}

async fn history(client: &Client, list: &ListArgs, image: &str) -> anyhow::Result<()> {
    let steps = client.get(&format!("/images/{image}/history")).await?;
    let row = |step: &Value| {
        json!({
            "ID": step["Id"], "CreatedSince": age(step["Created"].as_u64().unwrap_or(0)),
            "CreatedBy": step["CreatedBy"], "Comment": step["Comment"],
            "Size": format!("{:.1} MB", step["Size"].as_f64().unwrap_or_default() / 1e6),
        })
    };
    let rows: Vec<_> = steps.as_array().into_iter().flatten().map(row).collect();
    let columns = [
        ("ID", "IMAGE"),
        ("CreatedSince", "CREATED"),
        ("CreatedBy", "CREATED BY"),
        ("Size", "SIZE"),
        ("Comment", "COMMENT"),
    ];
    list.print(&columns, &rows)
}

/// Fetches an image, with our credentials for its registry if we have any.
pub(crate) async fn pull(client: &Client, image: &str, platform: &str, quiet: bool) -> anyhow::Result<()> {
    let path = format!("/images/create?fromImage={}&platform={}", escape(image), escape(platform));
    fetch(client, &path, image, quiet).await
}

async fn fetch(client: &Client, path: &str, image: &str, quiet: bool) -> anyhow::Result<()> {
    let answer = client.post_with_auth(path, Config::header_for_image(image)?, &json!({})).await?;
    if quiet {
        read_steps(answer, |_| Ok(())).await?;
        return line(image);
    }
    progress(answer).await
}

pub(crate) async fn build(client: &Client, args: &BuildArgs) -> anyhow::Result<()> {
    let remote = args.context.to_str().filter(|context| is_remote(context));
    let context = if remote.is_some() { whole("") } else { pack(&args.context)? };
    let ulimits: anyhow::Result<Vec<Value>> = args.ulimits.iter().map(|text| ulimit(text)).collect();
    let bytes = |text: &Option<String>| text.as_deref().map_or(Ok(0), size);
    let mut query = format!(
        "dockerfile={}&nocache={}&pull={}&q={}&target={}&buildargs={}&labels={}&networkmode={}&platform={}\
         &memory={}&shmsize={}&ulimits={}",
        escape(&args.file),
        args.no_cache,
        args.pull,
        args.quiet,
        escape(&args.target),
        escape(&arguments(&args.build_args).to_string()),
        escape(&arguments(&args.labels).to_string()),
        escape(&args.network),
        escape(&args.platform),
        bytes(&args.memory)?,
        bytes(&args.shm_size)?,
        escape(&json!(ulimits?).to_string()),
    );
    if let Some(remote) = remote {
        query += &format!("&remote={}", escape(remote));
    }
    for host in &args.hosts {
        query += &format!("&extrahosts={}", escape(host));
    }
    for tag in &args.tags {
        query += &format!("&t={}", escape(tag));
    }
    let request = Request::builder()
        .method(Method::POST)
        .header("content-type", "application/x-tar")
        .header("x-registry-config", Config::header_for_build()?);
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

/// A file, or standard input.
fn read(file: Option<&Path>) -> anyhow::Result<Body> {
    let mut input: Box<dyn std::io::Read + Send> = match file {
        None => Box::new(std::io::stdin()),
        Some(file) => {
            Box::new(std::fs::File::open(file).with_context(|| format!("{} cannot be read", file.display()))?)
        }
    };
    Ok(written(move |to| Ok(std::io::copy(&mut input, to).map(drop)?)))
}

/// Prints what the daemon tells, line by line; an error among it is ours.
pub(crate) async fn progress(response: Response<Incoming>) -> anyhow::Result<()> {
    read_steps(response, show).await
}

/// Reads an answer's lines as they come, each a JSON object.
pub(crate) async fn read_steps(
    response: Response<Incoming>,
    mut each: impl FnMut(&Value) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let mut body = response.into_body();
    let mut buffer = Vec::new();
    while let Some(frame) = body.frame().await {
        let Ok(data) = frame?.into_data() else { continue };
        buffer.extend_from_slice(&data);
        while let Some(end) = buffer.iter().position(|&byte| byte == b'\n') {
            let text: Vec<u8> = buffer.drain(..=end).collect();
            take_step(&text, &mut each)?;
        }
    }
    // The last line may have no end.
    take_step(&buffer, &mut each)
}

fn take_step(text: &[u8], each: &mut impl FnMut(&Value) -> anyhow::Result<()>) -> anyhow::Result<()> {
    if text.trim_ascii().is_empty() {
        return Ok(());
    }
    let step: Value = serde_json::from_slice(text).context("the daemon's progress cannot be read")?;
    match step["error"].as_str() {
        Some(error) => anyhow::bail!("{error}"),
        None => each(&step),
    }
}

fn show(step: &Value) -> anyhow::Result<()> {
    if let Some(text) = step["stream"].as_str() {
        std::io::stdout().write_all(text.as_bytes())?;
        std::io::stdout().flush()?;
    } else if let Some(status) = step["status"].as_str() {
        let id = step["id"].as_str().filter(|id| !id.is_empty()).map(|id| format!("{id}: ")).unwrap_or_default();
        line(&format!("{id}{status}"))?;
    }
    Ok(())
}

async fn push(client: &Client, args: &PushArgs) -> anyhow::Result<()> {
    let (name, tag) = match args.image.rsplit_once(':') {
        Some((name, tag)) if !tag.contains('/') => (name, tag),
        _ => (args.image.as_str(), "latest"),
    };
    let query = if args.all_tags { String::new() } else { format!("?tag={}", escape(tag)) };
    // The daemon asks for the header even of one who has no credentials.
    let auth = Config::header_for_image(name)?.unwrap_or_else(|| "e30=".to_owned());
    let answer = client.post_with_auth(&format!("/images/{name}/push{query}"), Some(auth), &json!({})).await?;
    if args.quiet { read_steps(answer, |_| Ok(())).await } else { progress(answer).await }
}

pub(crate) async fn remove(client: &Client, args: &RemoveArgs) -> anyhow::Result<()> {
    for image in &args.images {
        let removed = client.delete(&format!("/images/{image}?force={}", args.force)).await?;
        for entry in removed.as_array().into_iter().flatten() {
            for (what, name) in entry.as_object().into_iter().flatten() {
                line(&format!("{what}: {}", name.as_str().unwrap_or_default()))?;
            }
        }
    }
    Ok(())
}

async fn save(client: &Client, images: &[String], output: Option<&Path>) -> anyhow::Result<()> {
    let names: Vec<_> = images.iter().map(|image| format!("names={}", escape(image))).collect();
    let answer = client.send(Method::GET, &format!("/images/get?{}", names.join("&")), None).await?;
    write_to(answer, output).await
}

async fn load(client: &Client, input: Option<&Path>, quiet: bool) -> anyhow::Result<()> {
    let sent = client.send_archive("/images/load", read(input)?).await?;
    if quiet {
        read_steps(sent, |step| if step["stream"].is_null() { Ok(()) } else { show(step) }).await
    } else {
        progress(sent).await
    }
}
