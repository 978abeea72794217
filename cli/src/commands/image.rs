//! Images of one host: `skep build`, `push`, `tag` and so on.

use std::io::Write as _;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use bytes::Bytes;
use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use hyper::{Method, Response};
use serde_json::{Map, Value, json};

use crate::client::{Client, escape};
use crate::output::line;

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
    /// Directory that holds what may be copied
    context: PathBuf,
}

fn members(pairs: &[String]) -> Value {
    let pair = |text: &String| {
        let (key, value) =
            text.split_once('=').map_or((text.as_str(), None), |(key, value)| (key, Some(value.to_owned())));
        (key.to_owned(), json!(value.or_else(|| std::env::var(key).ok())))
    };
    Value::Object(pairs.iter().map(pair).collect::<Map<_, _>>())
}

pub(crate) async fn build(client: &Client, args: &BuildArgs) -> anyhow::Result<()> {
    let context = pack(&args.context)?;
    let mut query = format!(
        "dockerfile={}&nocache={}&pull={}&q={}&target={}&buildargs={}&labels={}",
        escape(&args.file),
        args.no_cache,
        args.pull,
        args.quiet,
        escape(&args.target),
        escape(&members(&args.build_args).to_string()),
        escape(&members(&args.labels).to_string()),
    );
    for tag in &args.tags {
        query += &format!("&t={}", escape(tag));
    }
    let response = client.send_bytes(Method::POST, &format!("/build?{query}"), "application/x-tar", context).await?;
    progress(response).await
}

/// The context as an archive; what `.dockerignore` names is left out by the daemon.
fn pack(dir: &Path) -> anyhow::Result<Bytes> {
    anyhow::ensure!(dir.is_dir(), "context {} is no directory", dir.display());
    let mut tar = tar::Builder::new(Vec::new());
    tar.follow_symlinks(false);
    tar.append_dir_all(".", dir).with_context(|| format!("context {} cannot be read", dir.display()))?;
    Ok(tar.into_inner()?.into())
}

/// Prints what the daemon tells, line by line; an error among it is ours.
pub(crate) async fn progress(response: Response<Incoming>) -> anyhow::Result<()> {
    let mut body = response.into_body();
    let mut buffer = Vec::new();
    while let Some(frame) = body.frame().await {
        let Ok(data) = frame?.into_data() else { continue };
        buffer.extend_from_slice(&data);
        while let Some(end) = buffer.iter().position(|&byte| byte == b'\n') {
            let text: Vec<u8> = buffer.drain(..=end).collect();
            if text.trim_ascii().is_empty() {
                continue;
            }
            let step: Value = serde_json::from_slice(&text).context("the daemon's progress cannot be read")?;
            if let Some(error) = step["error"].as_str() {
                anyhow::bail!("{error}");
            }
            if let Some(text) = step["stream"].as_str() {
                std::io::stdout().write_all(text.as_bytes())?;
                std::io::stdout().flush()?;
            } else if let Some(status) = step["status"].as_str() {
                let id =
                    step["id"].as_str().filter(|id| !id.is_empty()).map(|id| format!("{id}: ")).unwrap_or_default();
                line(&format!("{id}{status}"))?;
            }
        }
    }
    Ok(())
}

pub(crate) async fn push(client: &Client, image: &str) -> anyhow::Result<()> {
    let (name, tag) = match image.rsplit_once(':') {
        Some((name, tag)) if !tag.contains('/') => (name, tag),
        _ => (image, "latest"),
    };
    let path = format!("/images/{name}/push?tag={}", escape(tag));
    progress(client.send(Method::POST, &path, None).await?).await
}

pub(crate) async fn tag(client: &Client, image: &str, new: &str) -> anyhow::Result<()> {
    client.post(&format!("/images/{image}/tag?repo={}", escape(new)), &json!({})).await.map(drop)
}

pub(crate) async fn rmi(client: &Client, images: &[String], force: bool) -> anyhow::Result<()> {
    for image in images {
        let removed = client.delete(&format!("/images/{image}?force={force}")).await?;
        for entry in removed.as_array().into_iter().flatten() {
            for (what, name) in entry.as_object().into_iter().flatten() {
                line(&format!("{what}: {}", name.as_str().unwrap_or_default()))?;
            }
        }
    }
    Ok(())
}

pub(crate) async fn save(client: &Client, images: &[String], output: &Path) -> anyhow::Result<()> {
    let names: Vec<_> = images.iter().map(|image| format!("names={}", escape(image))).collect();
    let mut body = client.send(Method::GET, &format!("/images/get?{}", names.join("&")), None).await?.into_body();
    let mut file = std::fs::File::create(output).with_context(|| format!("{} cannot be written", output.display()))?;
    while let Some(frame) = body.frame().await {
        if let Ok(data) = frame?.into_data() {
            file.write_all(&data)?;
        }
    }
    Ok(())
}

pub(crate) async fn load(client: &Client, input: &Path) -> anyhow::Result<()> {
    let archive = std::fs::read(input).with_context(|| format!("{} cannot be read", input.display()))?;
    let sent = client.send_bytes(Method::POST, "/images/load", "application/x-tar", archive.into()).await?;
    progress(sent).await
}
