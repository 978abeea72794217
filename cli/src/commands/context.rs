//! `skep context …`

use std::fs::{File, OpenOptions};
use std::io::{self, IsTerminal as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use serde_json::{Value, json};

use crate::context::{ContextStore, DEFAULT, NamedContext, check_name};
use crate::credentials::Config;
use crate::endpoint::{Endpoint, TlsFiles};
use crate::output::{FormatArg, ListArgs, line};

#[derive(clap::Subcommand)]
pub(crate) enum ContextCommand {
    /// Give a daemon a name
    Create {
        name: String,
        #[arg(long, default_value = "")]
        description: String,
        /// Where it is: host=tcp://HOST:2376,ca=FILE,cert=FILE,key=FILE or host=ssh://USER@HOST
        #[arg(long, value_name = "host=…", required_unless_present = "from")]
        docker: Option<String>,
        /// Where another context says it is, by the same certificates
        #[arg(long, value_name = "CONTEXT", conflicts_with = "docker")]
        from: Option<String>,
    },
    /// Change what a name stands for
    Update {
        name: String,
        #[arg(long)]
        description: Option<String>,
        /// As for create
        #[arg(long, value_name = "host=…")]
        docker: Option<String>,
    },
    /// Pack a context, its private key with it, to take it elsewhere
    Export {
        name: String,
        /// Where to; '-' is the standard output [default: NAME.dockercontext]
        file: Option<PathBuf>,
    },
    /// Take a packed context in
    Import {
        name: String,
        /// What 'context export' wrote; '-' is the standard input
        file: PathBuf,
    },
    /// List the names
    Ls(ListArgs),
    /// Show contexts in full
    Inspect {
        /// The current one if absent
        names: Vec<String>,
        #[command(flatten)]
        format: FormatArg,
    },
    /// Name the current context
    Show,
    /// Make a context the current one
    Use { name: String },
    /// Remove contexts
    Rm {
        /// Also the current one; it is no error if one is not there
        #[arg(short, long)]
        force: bool,
        #[arg(required = true)]
        names: Vec<String>,
    },
}

/// Keeps a new context: as `docker` describes it, or else where `from` is.
fn create(
    store: &ContextStore,
    name: String,
    description: String,
    docker: Option<&str>,
    from: Option<&str>,
) -> anyhow::Result<()> {
    check_name(&name)?;
    if store.exists(&name) {
        bail!("context {name:?} already exists: change it with 'skep context update'");
    }
    let (host, tls) = match from {
        Some(from) => {
            let from = store.find(from)?;
            (from.host.clone(), from.tls().unwrap_or_default())
        }
        None => read_endpoint(docker.unwrap_or_default())?,
    };
    let skip_verify = tls.skip_verify;
    store.keep(&NamedContext { name: name.clone(), description, host, skip_verify, tls_dir: PathBuf::new() }, &tls)?;
    line(&name)
}

/// Runs a command; `current` is the context in force.
pub(crate) fn run(command: ContextCommand, current: &str) -> anyhow::Result<()> {
    let store = ContextStore::open()?;
    match command {
        ContextCommand::Create { name, description, docker, from } => {
            create(&store, name, description, docker.as_deref(), from.as_deref())
        }
        ContextCommand::Update { name, description, docker } => {
            let mut context = store.find(&name)?;
            let mut tls = TlsFiles::default();
            if let Some(docker) = docker {
                (context.host, tls) = read_endpoint(&docker)?;
                context.skip_verify = tls.skip_verify;
            }
            context.description = description.unwrap_or(context.description);
            store.keep(&context, &tls)?;
            line(&name)
        }
        ContextCommand::Export { name, file } => export(&store, &name, file),
        ContextCommand::Import { name, file } => {
            let packed: Box<dyn io::Read> = if file == Path::new("-") {
                Box::new(io::stdin())
            } else {
                Box::new(File::open(&file).with_context(|| format!("{} cannot be read", file.display()))?)
            };
            store.import(&name, packed).with_context(|| format!("{} cannot be imported", file.display()))?;
            line(&name)
        }
        ContextCommand::Ls(list) => self::list(&store, &list, current),
        ContextCommand::Inspect { names, format } => {
            let names = if names.is_empty() { vec![current.to_owned()] } else { names };
            let all = names.iter().map(|name| describe(&store, name)).collect::<anyhow::Result<Vec<_>>>()?;
            format.print_all(&all)
        }
        ContextCommand::Show => line(current),
        ContextCommand::Use { name } => {
            if name != DEFAULT {
                store.find(&name)?;
            }
            Config::load()?.set_context(&name)?;
            line(&name)
        }
        ContextCommand::Rm { force, names } => {
            for name in names {
                check_name(&name)?;
                if !force {
                    store.find(&name)?;
                    if name == current {
                        bail!("context {name:?} is in use: 'skep context use' another, or remove it with --force");
                    }
                }
                store.remove(&name)?;
                let mut config = Config::load()?;
                if config.context() == Some(&name) {
                    config.set_context(DEFAULT)?;
                }
                line(&name)?;
            }
            Ok(())
        }
    }
}

fn export(store: &ContextStore, name: &str, file: Option<PathBuf>) -> anyhow::Result<()> {
    if file.as_deref() == Some(Path::new("-")) {
        if io::stdout().is_terminal() {
            bail!("an archive is nothing for a terminal: name a file");
        }
        return store.export(name, io::stdout());
    }
    let file = file.unwrap_or_else(|| format!("{name}.dockercontext").into());
    store.find(name)?;
    // It holds a private key.
    let new = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&file);
    let new = new.with_context(|| format!("{} cannot be made", file.display()))?;
    store.export(name, new)?;
    line(&format!("written to {}", file.display()))
}

fn list(store: &ContextStore, list: &ListArgs, current: &str) -> anyhow::Result<()> {
    let row = |name: &str, description: &str, host: &str| {
        let mark = if name == current { format!("{name} *") } else { name.to_owned() };
        json!({"ID": name, "Name": name, "Marked": mark, "Description": description, "DockerEndpoint": host,
            "Current": name == current})
    };
    let named = store.list();
    let default = row(DEFAULT, "What flags and environment say", &default_host());
    let rows: Vec<_> = std::iter::once(default)
        .chain(named.iter().map(|context| row(&context.name, &context.description, &context.host)))
        .collect();
    list.print(&[("Marked", "NAME"), ("Description", "DESCRIPTION"), ("DockerEndpoint", "DOCKER ENDPOINT")], &rows)
}

fn default_host() -> String {
    crate::client::host_from_environment().unwrap_or_else(|| crate::client::DEFAULT_HOST.to_owned())
}

fn describe(store: &ContextStore, name: &str) -> anyhow::Result<Value> {
    if name == DEFAULT {
        let endpoint = json!({"Host": default_host(), "SkipTLSVerify": false});
        return Ok(json!({"Name": DEFAULT, "Metadata": {}, "Endpoints": {"docker": endpoint}, "TLSMaterial": {}}));
    }
    let context = store.find(name)?;
    let files = TlsFiles::in_dir(&context.tls_dir);
    let names = [("ca.pem", &files.ca), ("cert.pem", &files.cert), ("key.pem", &files.key)];
    let names: Vec<_> = names.iter().filter(|(_, file)| file.is_some()).map(|(name, _)| name).collect();
    Ok(json!({
        "Name": context.name, "Metadata": {"Description": context.description},
        "Endpoints": {"docker": {"Host": context.host, "SkipTLSVerify": context.skip_verify}},
        "TLSMaterial": if names.is_empty() { json!({}) } else { json!({"docker": names}) },
    }))
}

/// Reads `host=…,ca=FILE,cert=FILE,key=FILE,skip-tls-verify=true`.
fn read_endpoint(text: &str) -> anyhow::Result<(String, TlsFiles)> {
    let (mut host, mut tls) = (None, TlsFiles::default());
    for part in text.split(',').filter(|part| !part.is_empty()) {
        let (key, value) =
            part.split_once('=').with_context(|| format!("{part:?} cannot be read: write NAME=VALUE"))?;
        match key {
            "host" => host = Some(value.to_owned()),
            "ca" => tls.ca = Some(value.into()),
            "cert" => tls.cert = Some(value.into()),
            "key" => tls.key = Some(value.into()),
            "skip-tls-verify" => tls.skip_verify = value.parse().context("skip-tls-verify is true or false")?,
            _ => bail!("{key:?} is unknown: host, ca, cert, key and skip-tls-verify are known"),
        }
    }
    let host =
        host.context("no host is given: write host=tcp://HOST:2376, host=ssh://USER@HOST or host=unix://PATH")?;
    let asks = tls.ca.is_some() || tls.cert.is_some() || tls.skip_verify;
    // What cannot be used is not kept.
    Endpoint::parse(&host, asks.then_some(&tls))?;
    Ok((host, tls))
}
