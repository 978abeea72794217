//! What is in a container, and in and out of it: `skep cp`, `diff`, `export`, `commit`.

use std::io::{IsTerminal as _, Read};
use std::path::{Component, Path, PathBuf};

use anyhow::Context as _;
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use hyper::{Method, Response};
use serde_json::{Value, json};

use crate::client::{Client, escape};
use crate::output::line;
use crate::pipes::{Body, read_by, written};

/// Go's flag for a directory in a file's mode.
const DIRECTORY: u64 = 1 << 31;

#[derive(clap::Args)]
pub(crate) struct CopyArgs {
    /// Keep owners
    #[arg(short, long)]
    archive: bool,
    /// Copy what a link leads to instead of the link
    #[arg(short = 'L', long)]
    follow_link: bool,
    /// Say nothing
    #[arg(short, long)]
    quiet: bool,
    /// CONTAINER:PATH, a path of ours, or - for an archive on standard input
    source: String,
    /// CONTAINER:PATH, a path of ours, or - for an archive on standard output
    target: String,
}

#[derive(clap::Args)]
pub(crate) struct CommitArgs {
    #[arg(short, long, default_value = "")]
    author: String,
    #[arg(short, long, default_value = "")]
    message: String,
    /// An instruction of a Dockerfile, such as CMD ["sh"] (repeatable)
    #[arg(short, long = "change", value_name = "INSTRUCTION")]
    changes: Vec<String>,
    /// Hold the container meanwhile
    #[arg(short, long, num_args = 0..=1, require_equals = true, default_value_t = true, default_missing_value = "true", action = clap::ArgAction::Set)]
    pause: bool,
    container: String,
    /// Name of the image
    #[arg(default_value = "")]
    image: String,
}

/// One end of a copy.
enum End<'a> {
    Ours(&'a str),
    Container { name: &'a str, path: &'a str },
}

impl<'a> End<'a> {
    /// A path that begins with `/` or `.` is ours whatever it holds.
    fn parse(text: &'a str) -> Self {
        match text.split_once(':') {
            Some((name, path)) if !text.starts_with(['/', '.']) => Self::Container { name, path },
            _ => Self::Ours(text),
        }
    }
}

pub(crate) async fn copy(client: &Client, args: &CopyArgs) -> anyhow::Result<()> {
    match (End::parse(&args.source), End::parse(&args.target)) {
        (End::Container { name, path }, End::Ours(target)) => copy_out(client, args, name, path, target).await,
        (End::Ours(source), End::Container { name, path }) => copy_in(client, args, source, name, path).await,
        (End::Container { .. }, End::Container { .. }) => {
            anyhow::bail!("copying from container to container is not supported: copy through a directory of ours")
        }
        (End::Ours(_), End::Ours(_)) => {
            anyhow::bail!("neither {:?} nor {:?} is in a container: write CONTAINER:PATH", args.source, args.target)
        }
    }
}

async fn copy_out(client: &Client, args: &CopyArgs, name: &str, path: &str, target: &str) -> anyhow::Result<()> {
    let mut path = path.to_owned();
    if args.follow_link
        && let Some(link) =
            stat(client, name, &path).await?.and_then(|stat| Some(stat["linkTarget"].as_str()?.to_owned()))
        && !link.is_empty()
    {
        path = link;
    }
    let answer = client.send(Method::GET, &archive_path(name, &path), None).await?;
    if target == "-" {
        return write_body(answer, &mut std::io::stdout()).await;
    }
    let into_dir = target.ends_with('/') || Path::new(target).is_dir();
    anyhow::ensure!(!into_dir || Path::new(target).is_dir(), "directory {target} is not there: make it first");
    let (keep_owners, to) = (args.archive, PathBuf::from(target));
    read_by(answer, move |archive| {
        let mut tar = tar::Archive::new(archive);
        tar.set_preserve_permissions(true);
        tar.set_preserve_ownerships(keep_owners);
        if into_dir { Ok(tar.unpack(to)?) } else { unpack_as(tar, &to) }
    })
    .await?;
    if !args.quiet {
        eprintln!("copied {name}:{path} to {target}");
    }
    Ok(())
}

/// Unpacks an archive of one tree under another name.
fn unpack_as(mut tar: tar::Archive<impl Read>, target: &Path) -> anyhow::Result<()> {
    let failed = || format!("{} cannot be written", target.display());
    for entry in tar.entries()? {
        let mut entry = entry?;
        let inner: PathBuf = entry.path()?.components().skip(1).collect();
        // The daemon makes no such names; who stands in for it might.
        let plain = inner.components().all(|part| matches!(part, Component::Normal(_)));
        anyhow::ensure!(plain, "the archive holds {}, which leads out of it", inner.display());
        let path = if inner.as_os_str().is_empty() { target.to_owned() } else { target.join(&inner) };
        entry.unpack(&path).with_context(failed)?;
    }
    Ok(())
}

async fn copy_in(client: &Client, args: &CopyArgs, source: &str, name: &str, path: &str) -> anyhow::Result<()> {
    let (dir, archive) = if source == "-" {
        (path.to_owned(), written(|to| Ok(std::io::copy(&mut std::io::stdin(), to).map(drop)?)))
    } else {
        let there = stat(client, name, path).await?;
        let is_dir = there.as_ref().and_then(|stat| stat["mode"].as_u64()).is_some_and(|mode| mode & DIRECTORY != 0);
        let path = if path.is_empty() { "/" } else { path };
        anyhow::ensure!(is_dir || !path.ends_with('/'), "directory {path} is not in container {name}: make it first");
        let own_name = Path::new(source).file_name().map(|name| name.to_string_lossy().into_owned());
        if source.ends_with("/.") || source == "." {
            // The content alone.
            if is_dir { (path.to_owned(), pack(source, ".", args.follow_link)?) } else { renamed(source, path, args)? }
        } else if is_dir {
            let own_name = own_name.with_context(|| format!("{source} has no name to copy it under"))?;
            (path.to_owned(), pack(source, &own_name, args.follow_link)?)
        } else {
            renamed(source, path, args)?
        }
    };
    let request = hyper::Request::builder().method(Method::PUT).header("content-type", "application/x-tar");
    let query = format!("{}&noOverwriteDirNonDir=true&copyUIDGID={}", archive_path(name, &dir), args.archive);
    client.send_request(request, &query, archive).await?;
    if !args.quiet {
        eprintln!("copied {source} to {name}:{path}");
    }
    Ok(())
}

/// An archive of `source` under the last name of `path`, and the directory it goes to.
fn renamed(source: &str, path: &str, args: &CopyArgs) -> anyhow::Result<(String, Body)> {
    let path = Path::new(path);
    let name = path.file_name().with_context(|| format!("{} has no name", path.display()))?;
    let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or_else(|| Path::new("/"));
    Ok((dir.display().to_string(), pack(source, &name.to_string_lossy(), args.follow_link)?))
}

fn pack(source: &str, name: &str, follow_link: bool) -> anyhow::Result<Body> {
    let (source, name) = (source.to_owned(), name.to_owned());
    let failed = format!("{source} cannot be read");
    let found = if follow_link { std::fs::metadata(&source) } else { std::fs::symlink_metadata(&source) };
    let is_dir = found.with_context(|| failed.clone())?.is_dir();
    Ok(written(move |to| {
        let mut tar = tar::Builder::new(to);
        tar.follow_symlinks(follow_link);
        let appended = if is_dir { tar.append_dir_all(name, source) } else { tar.append_path_with_name(source, name) };
        appended.context(failed)?;
        Ok(tar.finish()?)
    }))
}

fn archive_path(name: &str, path: &str) -> String {
    format!("/containers/{}/archive?path={}", escape(name), escape(if path.is_empty() { "/" } else { path }))
}

/// What is at a path of a container; `None` if nothing is.
async fn stat(client: &Client, name: &str, path: &str) -> anyhow::Result<Option<Value>> {
    // A container that is not there is told by this.
    client.get(&format!("/containers/{}/json", escape(name))).await?;
    let Ok(answer) = client.send(Method::HEAD, &archive_path(name, path), None).await else { return Ok(None) };
    let header = answer.headers().get("x-docker-container-path-stat").context("the daemon said nothing of the path")?;
    Ok(Some(serde_json::from_slice(&BASE64_STANDARD.decode(header.as_bytes())?)?))
}

/// Hands a body on as it comes.
pub(crate) async fn write_body(answer: Response<Incoming>, to: &mut impl std::io::Write) -> anyhow::Result<()> {
    let mut body = answer.into_body();
    while let Some(frame) = body.frame().await {
        if let Ok(data) = frame?.into_data() {
            to.write_all(&data)?;
            to.flush()?;
        }
    }
    Ok(())
}

pub(crate) async fn diff(client: &Client, container: &str) -> anyhow::Result<()> {
    let changes = client.get(&format!("/containers/{}/changes", escape(container))).await?;
    for change in changes.as_array().into_iter().flatten() {
        let kind = match change["Kind"].as_u64() {
            Some(0) => "C",
            Some(1) => "A",
            _ => "D",
        };
        line(&format!("{kind} {}", change["Path"].as_str().unwrap_or_default()))?;
    }
    Ok(())
}

pub(crate) async fn export(client: &Client, container: &str, output: Option<&Path>) -> anyhow::Result<()> {
    write_to(client.send(Method::GET, &format!("/containers/{}/export", escape(container)), None).await?, output).await
}

/// Hands a body on to a file, or to standard output if that is no terminal.
pub(crate) async fn write_to(answer: Response<Incoming>, output: Option<&Path>) -> anyhow::Result<()> {
    if let Some(path) = output {
        let file = std::fs::File::create(path).with_context(|| format!("{} cannot be written", path.display()))?;
        return write_body(answer, &mut std::io::BufWriter::new(file)).await;
    }
    anyhow::ensure!(!std::io::stdout().is_terminal(), "an archive is nothing for a terminal: use --output, or a pipe");
    write_body(answer, &mut std::io::stdout()).await
}

pub(crate) async fn commit(client: &Client, args: &CommitArgs) -> anyhow::Result<()> {
    let mut query = format!(
        "container={}&repo={}&author={}&comment={}&pause={}",
        escape(&args.container),
        escape(&args.image),
        escape(&args.author),
        escape(&args.message),
        args.pause
    );
    for change in &args.changes {
        query += &format!("&changes={}", escape(change));
    }
    let made = client.post(&format!("/commit?{query}"), &json!({})).await?;
    line(made["Id"].as_str().unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_end_is_in_a_container_or_ours() {
        let parse = |text| match End::parse(text) {
            End::Ours(path) => format!("ours {path}"),
            End::Container { name, path } => format!("{name} {path}"),
        };
        for (text, want) in [
            ("web:/etc", "web /etc"),
            ("web:", "web "),
            ("/a:b", "ours /a:b"),
            ("./a:b", "ours ./a:b"),
            ("a", "ours a"),
            ("-", "ours -"),
        ] {
            assert_eq!(parse(text), want);
        }
    }
}
