//! Images of one host: `skep build`, `push`, `tag` and so on.

use std::io::Write as _;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use hyper::{Method, Response};
use serde_json::{Value, json};

use super::build::{BuildArgs, build};
use super::files::write_to;
use super::inspect::{InspectArgs, inspect};
use super::prune::{self, PruneAllArgs};
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
        #[command(flatten)]
        platform: PlatformArg,
        #[arg(required = true)]
        images: Vec<String>,
    },
    /// Read images from an archive
    Load {
        /// [default: standard input]
        #[arg(short, long, value_name = "FILE")]
        input: Option<PathBuf>,
        #[command(flatten)]
        platform: PlatformArg,
        /// Show no progress
        #[arg(short, long)]
        quiet: bool,
    },
    /// Show how an image came to be
    History {
        #[command(flatten)]
        list: ListArgs,
        /// Show ids and commands in full
        #[arg(long)]
        no_trunc: bool,
        /// Sizes and times as people say them; in bytes and as dates if false
        #[arg(short = 'H', long, num_args = 0..=1, require_equals = true, default_value_t = true, default_missing_value = "true", action = clap::ArgAction::Set)]
        human: bool,
        #[command(flatten)]
        platform: PlatformArg,
        image: String,
    },
    /// Make an image of an archive of files
    Import {
        #[arg(short, long, default_value = "")]
        message: String,
        /// An instruction of a Dockerfile, such as CMD ["sh"] (repeatable)
        #[arg(short, long = "change", value_name = "INSTRUCTION")]
        changes: Vec<String>,
        /// OS[/ARCHITECTURE[/VARIANT]] that it is for
        #[arg(long, default_value = "")]
        platform: String,
        /// A file, the URL of one that the daemon fetches, or - for standard input
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
    Inspect {
        #[command(flatten)]
        platform: PlatformArg,
        #[command(flatten)]
        args: InspectArgs,
    },
    /// Remove images
    Rm(RemoveArgs),
    /// Remove nameless images that nobody uses
    Prune(PruneAllArgs),
}

/// The platform that an image must be for.
#[derive(clap::Args)]
pub(crate) struct PlatformArg {
    /// Only if it is for OS[/ARCHITECTURE[/VARIANT]]
    #[arg(long = "platform", value_name = "PLATFORM")]
    name: Option<String>,
}

impl PlatformArg {
    /// As the API has it, with what joins it to the parameters before.
    fn query(&self, joint: char) -> anyhow::Result<String> {
        let Some(name) = &self.name else { return Ok(String::new()) };
        let platform: skep_engine::Platform = name.parse()?;
        Ok(format!("{joint}platform={}", escape(&json!(platform).to_string())))
    }
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
    /// Of no effect: images have no parents of their own
    #[arg(long, hide = true)]
    no_prune: bool,
    #[command(flatten)]
    platform: PlatformArg,
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
    #[command(flatten)]
    trust: TrustArg,
    /// Show no progress
    #[arg(short, long)]
    quiet: bool,
    image: String,
}

/// Docker's own signatures, which no registry that is used with this looks at.
#[derive(clap::Args)]
pub(crate) struct TrustArg {
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", hide = true)]
    disable_content_trust: Option<bool>,
}

#[derive(clap::Args)]
pub(crate) struct PushArgs {
    /// Every tag of the repository that is here
    #[arg(short, long)]
    all_tags: bool,
    #[command(flatten)]
    platform: PlatformArg,
    #[command(flatten)]
    trust: TrustArg,
    /// Show no progress
    #[arg(short, long)]
    quiet: bool,
    image: String,
}

pub(crate) async fn run(client: &Client, command: ImageCommand) -> anyhow::Result<()> {
    match command {
        ImageCommand::Pull(args) if args.all_tags => {
            let last = args.image.rsplit('/').next().unwrap_or(&args.image);
            anyhow::ensure!(!last.contains([':', '@']), "tag can't be used with --all-tags/-a");
            let path = format!("/images/create?fromImage={}&platform={}", escape(&args.image), escape(&args.platform));
            fetch(client, &path, &args.image, args.quiet).await
        }
        ImageCommand::Pull(args) => pull(client, &args.image, &args.platform, args.quiet).await,
        ImageCommand::Push(args) => push(client, &args).await,
        ImageCommand::Build(args) => build(client, &args).await,
        ImageCommand::Tag { image, name } => {
            client.post(&format!("/images/{image}/tag?repo={}", escape(&name)), &json!({})).await.map(drop)
        }
        ImageCommand::Save { output, platform, images } => save(client, &images, &platform, output.as_deref()).await,
        ImageCommand::Load { input, platform, quiet } => load(client, input.as_deref(), &platform, quiet).await,
        ImageCommand::History { list, no_trunc, human, platform, image } => {
            let steps = client.get(&format!("/images/{image}/history{}", platform.query('?')?)).await?;
            history(&list, &steps, no_trunc, human)
        }
        ImageCommand::Import { message, changes, platform, file, image } => {
            let remote = file.to_str().filter(|url| url.starts_with("http://") || url.starts_with("https://"));
            let (repo, message, platform) = (escape(&image), escape(&message), escape(&platform));
            let source = escape(remote.unwrap_or("-"));
            let mut query = format!("fromSrc={source}&repo={repo}&message={message}&platform={platform}");
            changes.iter().for_each(|change| query += &format!("&changes={}", escape(change)));
            let archive = match remote {
                Some(_) => whole(""),
                None => read(Some(&file).filter(|file| file.as_os_str() != "-").map(PathBuf::as_path))?,
            };
            let path = format!("/images/create?{query}");
            progress(client.send_archive(&path, archive).await?).await
        }
    }
}

pub(crate) async fn run_group(client: &Client, command: ImageGroup) -> anyhow::Result<()> {
    match command {
        ImageGroup::Verb(command) => run(client, command).await,
        ImageGroup::Ls(args) => list(client, &args).await,
        ImageGroup::Inspect { platform, args } => inspect(client, &args, Some("image"), &platform.query('&')?).await,
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

fn history(list: &ListArgs, steps: &Value, no_trunc: bool, human: bool) -> anyhow::Result<()> {
    let short = |text: &str, len: usize| match text.char_indices().nth(len) {
        Some((at, _)) if !no_trunc => format!("{}…", &text[..at]),
        _ => text.to_owned(),
    };
    let row = |step: &Value| {
        let (created, size) = (step["Created"].as_i64().unwrap_or(0), step["Size"].as_f64().unwrap_or_default());
        let id = step["Id"].as_str().unwrap_or_default();
        let plain = id.trim_start_matches("sha256:");
        let at = jiff::Timestamp::from_second(created).unwrap_or_default().to_string();
        json!({
            "ID": if no_trunc { id } else { &plain[..plain.len().min(12)] },
            "CreatedSince": if human { age(created.max(0).cast_unsigned()) } else { at.clone() }, "CreatedAt": at,
            "CreatedBy": short(step["CreatedBy"].as_str().unwrap_or_default(), 44), "Comment": step["Comment"],
            "Size": if human { format!("{:.1} MB", size / 1e6) } else { step["Size"].to_string() },
        })
    };
    let rows: Vec<_> = steps.as_array().into_iter().flatten().map(row).collect();
    let columns = [
        ("ID", "IMAGE"),
        ("CreatedSince", if human { "CREATED" } else { "CREATED AT" }),
        ("CreatedBy", "CREATED BY"),
        ("Size", "SIZE"),
        ("Comment", "COMMENT"),
    ];
    list.print(&columns, &rows)
}

/// The image under the tag that is meant where none is named.
pub(crate) fn tagged(image: &str) -> String {
    let name = image.rsplit('/').next().unwrap_or(image);
    if name.contains([':', '@']) { image.to_owned() } else { format!("{image}:latest") }
}

/// Fetches an image, with our credentials for its registry if we have any.
pub(crate) async fn pull(client: &Client, image: &str, platform: &str, quiet: bool) -> anyhow::Result<()> {
    let path = format!("/images/create?fromImage={}&platform={}", escape(&tagged(image)), escape(platform));
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

pub(crate) fn show(step: &Value) -> anyhow::Result<()> {
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
    let tag = if args.all_tags { "" } else { tag };
    let query = format!("?tag={}{}", escape(tag), args.platform.query('&')?);
    // The daemon asks for the header even of one who has no credentials.
    let auth = Config::header_for_image(name)?.unwrap_or_else(|| "e30=".to_owned());
    let answer = client.post_with_auth(&format!("/images/{name}/push{query}"), Some(auth), &json!({})).await?;
    if args.quiet { read_steps(answer, |_| Ok(())).await } else { progress(answer).await }
}

pub(crate) async fn remove(client: &Client, args: &RemoveArgs) -> anyhow::Result<()> {
    let platform = args.platform.query('&')?.replace("platform=", "platforms=");
    for image in &args.images {
        let removed = client.delete(&format!("/images/{image}?force={}{platform}", args.force)).await?;
        for entry in removed.as_array().into_iter().flatten() {
            for (what, name) in entry.as_object().into_iter().flatten() {
                line(&format!("{what}: {}", name.as_str().unwrap_or_default()))?;
            }
        }
    }
    Ok(())
}

async fn save(client: &Client, images: &[String], platform: &PlatformArg, output: Option<&Path>) -> anyhow::Result<()> {
    let names: Vec<_> = images.iter().map(|image| format!("names={}", escape(image))).collect();
    let answer =
        client.send(Method::GET, &format!("/images/get?{}{}", names.join("&"), platform.query('&')?), None).await?;
    write_to(answer, output).await
}

async fn load(client: &Client, input: Option<&Path>, platform: &PlatformArg, quiet: bool) -> anyhow::Result<()> {
    let sent = client.send_archive(&format!("/images/load{}", platform.query('?')?), read(input)?).await?;
    if quiet {
        read_steps(sent, |step| if step["stream"].is_null() { Ok(()) } else { show(step) }).await
    } else {
        progress(sent).await
    }
}

/// Asks all the same: the daemon says why it looks nowhere.
pub(crate) async fn search(client: &Client, term: &str) -> anyhow::Result<()> {
    let found = client.get(&format!("/images/search?term={}", escape(term))).await?;
    line(&found.to_string())
}
