//! Runs a stage of a Dockerfile, step by step.
//!
//! A step's key is made of all that it depends on: what came before, the instruction with its
//! variables put in, the arguments in force, and the content it copies. The cache holds a key's
//! layer as long as some image has that; so it grows with images and goes with them.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;

use sha2::{Digest as _, Sha256};
use skep_api::SecretBytes;
use skep_api::container::Ulimit;
use tokio::net::UnixStream;
use tokio::sync::mpsc;

use crate::build::context::clean;
use crate::build::instruction::{Draft, set_env};
use crate::build::parse::{self, Instruction};
use crate::build::plan::Plan;
use crate::build::running::args;
use crate::build::stage::Mounted;
use crate::build::words;
use crate::container::config::{NetworkMode, ResourceLimits};
use crate::container::logs::Stream;
use crate::engine::{EngineError, now};
use crate::image::builtin::is_builtin;
use crate::image::pull::Credentials;
use crate::image::store::{ConfigBlob, HistoryEntry, Image};
use crate::image::{Platform, normalize, short};
use crate::sys;

/// What an image is built with.
#[derive(Clone, Debug, Default)]
pub struct BuildOptions {
    /// The Dockerfile's path in the context.
    pub dockerfile: String,
    pub tags: Vec<String>,
    /// No value: the argument is taken away.
    pub build_args: BTreeMap<String, Option<String>>,
    pub labels: BTreeMap<String, String>,
    /// The stage to build; empty: the last.
    pub target: String,
    pub no_cache: bool,
    /// Images whose layers alone count as cached; empty: all layers do.
    pub cache_from: Vec<String>,
    /// Whether base images are asked for in their registries though they are here.
    pub pull: bool,
    /// What images are built for; none: this host.
    pub platform: Option<Platform>,
    pub network: NetworkMode,
    /// Lines `IP name…` for /etc/hosts.
    pub hosts: Vec<String>,
    pub limits: ResourceLimits,
    pub shm_size_bytes: i64,
    pub cgroup_parent: String,
    pub ulimits: Vec<Ulimit>,
    /// Where the Dockerfile lies, if not in the context.
    pub dockerfile_dir: Option<PathBuf>,
    /// What else may be copied from and built upon, by name; it goes before stages and images that are called so.
    pub contexts: BTreeMap<String, NamedContext>,
    pub client: Client,
    /// Whether what stages say is told at once; if not, in the order of the file.
    pub at_once: bool,
}

/// A context beside the main one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NamedContext {
    /// A directory of files.
    Files(PathBuf),
    /// An image's name.
    Image(String),
}

pub type Lending<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// Whoever wants a build, and lends it what they have.
pub trait Lender: Send + Sync {
    /// What `RUN --mount=type=secret` shows.
    fn secret<'a>(&'a self, id: &'a str) -> Lending<'a, Result<Option<SecretBytes>, String>>;

    fn credentials<'a>(&'a self, registry: &'a str) -> Lending<'a, Credentials>;

    /// Whether there is an agent with keys for `RUN --mount=type=ssh`.
    fn has_agent<'a>(&'a self, _id: &'a str) -> Lending<'a, bool> {
        Box::pin(async { false })
    }

    /// Joins a step's connection to the agent until one of them ends it.
    fn connect_agent<'a>(&'a self, _id: &'a str, _connection: UnixStream) -> Lending<'a, ()> {
        Box::pin(async {})
    }
}

/// A build's client; without one, nothing is lent.
#[derive(Clone, Default)]
pub struct Client(Option<Arc<dyn Lender>>);

impl Client {
    pub fn new(lender: impl Lender + 'static) -> Self {
        Self(Some(Arc::new(lender)))
    }

    pub(super) async fn secret(&self, id: &str) -> Result<Option<SecretBytes>, String> {
        match &self.0 {
            Some(lender) => lender.secret(id).await,
            None => Ok(None),
        }
    }

    pub(super) async fn has_agent(&self, id: &str) -> bool {
        match &self.0 {
            Some(lender) => lender.has_agent(id).await,
            None => false,
        }
    }

    pub(super) async fn connect_agent(&self, id: &str, connection: UnixStream) {
        if let Some(lender) = &self.0 {
            lender.connect_agent(id, connection).await;
        }
    }

    async fn credentials(&self, registry: &str) -> Credentials {
        match &self.0 {
            Some(lender) => lender.credentials(registry).await,
            None => Credentials::default(),
        }
    }
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0.is_some() { "Client" } else { "Client(none)" })
    }
}

/// One instruction of a Dockerfile, as it is done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    /// Among those of all stages that are built, from 1.
    pub number: usize,
    pub of: usize,
    /// The instruction with its flags.
    pub text: String,
    /// Empty: the only one, without a name.
    pub stage: String,
    /// Which of its stage's steps that change files it is, from 1, and how many those are; none: it changes no file.
    pub place: Option<(usize, usize)>,
}

/// What a build tells while it runs; steps go by their numbers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BuildOutput {
    Started(Step),
    /// It was done before.
    Cached(usize),
    /// It runs in a container.
    Running(usize, String),
    /// What its command writes.
    Written(usize, Stream, Vec<u8>),
    /// It came to this key.
    Ended(usize, String),
    Failed(usize, String),
    /// What is no step's.
    Text(String),
    /// The image it came to.
    Image(String),
}

impl BuildOutput {
    /// As Docker's classic builder writes it.
    pub fn text(&self) -> Option<String> {
        Some(match self {
            Self::Started(step) => format!("Step {}/{} : {}\n", step.number, step.of, step.text),
            Self::Cached(_) => " ---> Using cache\n".into(),
            Self::Running(_, id) => format!(" ---> Running in {}\n", short(id)),
            Self::Written(_, stream, bytes) => {
                let text = String::from_utf8_lossy(bytes);
                // Red.
                if *stream == Stream::Stderr { format!("\x1b[91m{text}\x1b[0m") } else { text.into_owned() }
            }
            Self::Ended(_, key) => format!(" ---> {}\n", short(key)),
            Self::Text(text) => text.clone(),
            Self::Failed(..) | Self::Image(_) => return None,
        })
    }
}

/// Why a build came to nothing.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    #[error("{0}")]
    Dockerfile(String),
    #[error("The command '{command}' returned a non-zero code: {code}")]
    Command { command: String, code: i32 },
    #[error("{step} failed: {reason}")]
    Step { step: String, reason: String },
    #[error(transparent)]
    Engine(#[from] EngineError),
    #[error("the build was given up: the client is gone")]
    GivenUp,
}

/// A stage under way, or done.
#[derive(Clone, Default)]
pub(super) struct Stage {
    pub(super) draft: Draft,
    pub(super) layers: Vec<String>,
    pub(super) history: Vec<HistoryEntry>,
    /// What its image is for.
    pub(super) platform: Platform,
    /// ARGs in force.
    pub(super) args: BTreeMap<String, String>,
    /// Digest of all that its state depends on.
    pub(super) key: String,
}

impl Stage {
    /// Takes on what a step has written. What comes after depends on that, not only on how it was made: a step that ran
    /// once more may have come to something else.
    pub(super) fn add_layer(&mut self, layer: String) {
        self.key = key(&[&self.key, &layer]);
        self.layers.push(layer);
    }
}

/// Where commands are looked for unless an image says otherwise.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Builds one stage.
pub(super) struct Builder {
    pub(super) plan: Arc<Plan>,
    pub(super) number: usize,
    /// The stages that it needs.
    pub(super) done: BTreeMap<usize, Stage>,
    pub(super) output: mpsc::Sender<BuildOutput>,
    /// Steps before this one, of all stages.
    pub(super) step: usize,
    /// Steps of this stage so far that change files.
    pub(super) place: usize,
}

/// Whether an instruction is one that may come to a layer, or brings layers with it.
fn changes_files(instruction: &Instruction) -> bool {
    matches!(instruction.name.as_str(), "FROM" | "RUN" | "COPY" | "ADD" | "WORKDIR")
}

impl Builder {
    pub(super) async fn tell(&self, output: BuildOutput) -> Result<(), BuildError> {
        self.output.send(output).await.map_err(|_| BuildError::GivenUp)
    }

    pub(super) async fn stage(mut self) -> Result<Stage, BuildError> {
        let built = self.steps().await;
        if let Err(error) = &built {
            self.tell(BuildOutput::Failed(self.step, error.to_string())).await?;
        }
        built
    }

    async fn steps(&mut self) -> Result<Stage, BuildError> {
        let plan = self.plan.clone();
        let written = &plan.written[self.number];
        self.next_step(&written.from).await?;
        let platform = plan.platform(written)?;
        let mut stage = self.base(&plan.base_name(written)?, platform.as_ref()).await?;
        self.tell(BuildOutput::Ended(self.step, stage.key.clone())).await?;
        let triggers = std::mem::take(&mut stage.draft.config.on_build);
        if !triggers.is_empty() {
            self.tell(BuildOutput::Text(format!("# Executing {} build triggers\n", triggers.len()))).await?;
        }
        for trigger in triggers {
            let instruction = parse::instruction(written.from.line, &trigger).map_err(BuildError::Dockerfile)?;
            self.apply(&mut stage, &instruction).await?;
        }
        for instruction in &written.body {
            self.next_step(instruction).await?;
            self.apply(&mut stage, instruction).await?;
            self.tell(BuildOutput::Ended(self.step, stage.key.clone())).await?;
        }
        Ok(stage)
    }

    async fn next_step(&mut self, instruction: &Instruction) -> Result<(), BuildError> {
        self.step += 1;
        if changes_files(instruction) {
            self.place += 1;
        }
        let of = 1 + self.plan.written[self.number].body.iter().filter(|step| changes_files(step)).count();
        let step = Step {
            number: self.step,
            of: self.plan.steps,
            text: format!("{} {}{}", instruction.name, instruction.written_flags(), instruction.rest),
            stage: self.plan.stage_name(self.number),
            place: changes_files(instruction).then_some((self.place, of)),
        };
        self.tell(BuildOutput::Started(step)).await
    }

    /// What a stage begins with: nothing, another stage, or an image.
    async fn base(&self, name: &str, platform: Option<&Platform>) -> Result<Stage, BuildError> {
        if name == "scratch" {
            let mut draft = Draft::default();
            set_env(&mut draft.config.env, "PATH", PATH);
            let platform = platform.cloned().unwrap_or_else(Platform::own);
            return Ok(Stage { key: key(&["scratch", &platform.to_string()]), draft, platform, ..Stage::default() });
        }
        let named = self.plan.options.contexts.get(name);
        if named.is_none()
            && let Some(other) = self.plan.stage_of(name, self.number).and_then(|other| self.done.get(&other))
        {
            let mut stage = other.clone();
            stage.args.clear();
            stage.draft.cmd_is_own = false;
            return Ok(stage);
        }
        let image = self.image(name, platform).await?;
        let store = self.plan.engine.image_store();
        let blob: Option<ConfigBlob> =
            store.config_blob(&image.id).ok().and_then(|raw| serde_json::from_slice(&raw).ok());
        let mut draft = Draft { config: image.config.clone(), ..Draft::default() };
        if !draft.config.env.iter().any(|var| var.starts_with("PATH=")) {
            set_env(&mut draft.config.env, "PATH", PATH);
        }
        Ok(Stage {
            draft,
            layers: image.layers.clone(),
            history: blob.map(|blob| blob.history).unwrap_or_default(),
            args: BTreeMap::new(),
            platform: image.platform(),
            key: image.id.trim_start_matches("sha256:").to_owned(),
        })
    }

    pub(super) async fn image(&self, name: &str, platform: Option<&Platform>) -> Result<Image, BuildError> {
        let name = match self.plan.options.contexts.get(name) {
            Some(NamedContext::Image(image)) => image,
            Some(NamedContext::Files(_)) => {
                return Err(BuildError::Dockerfile(format!(
                    "the context {name} is a directory: it can be copied from, but nothing can be built upon it"
                )));
            }
            None => name,
        };
        match self.plan.engine.image_for(name, platform) {
            Ok(image) if !self.plan.options.pull || is_builtin(name) => Ok(image),
            _ => {
                let full = normalize(name).unwrap_or_default();
                let registry = full.split('/').next().unwrap_or_default();
                let credentials = self.plan.options.client.credentials(registry).await;
                let (progress, mut steps) = mpsc::channel(64);
                let drain = async { while steps.recv().await.is_some() {} };
                let pulled = async {
                    let pulled = self.plan.engine.pull(name, platform, &credentials, &progress).await;
                    drop(progress);
                    pulled
                };
                Ok(tokio::join!(pulled, drain).0?)
            }
        }
    }

    /// A stage's variables: what ENV set, then what ARG declared.
    pub(super) fn lookup(stage: &Stage, name: &str) -> Option<String> {
        let env =
            stage.draft.config.env.iter().find_map(|var| var.strip_prefix(name)?.strip_prefix('=').map(str::to_owned));
        env.or_else(|| stage.args.get(name).cloned())
    }

    async fn apply(&self, stage: &mut Stage, instruction: &Instruction) -> Result<(), BuildError> {
        let before = stage.clone();
        let lookup = |name: &str| Self::lookup(&before, name);
        if let Some(applied) = stage.draft.apply(instruction, self.plan.escape, &lookup) {
            applied.map_err(BuildError::Dockerfile)?;
            let state = serde_json::to_string(&stage.draft.config).unwrap_or_default();
            stage.key = key(&[&before.key, &instruction.name, &state]);
            if self.plan.cached(&stage.key).is_some() {
                self.tell(BuildOutput::Cached(self.step)).await?;
            } else {
                self.plan.remember(&stage.key, "")?;
            }
            Self::note(stage, instruction, true);
            return Ok(());
        }
        let expand = |word: &str| words::expand(word, self.plan.escape, &lookup).map_err(BuildError::Dockerfile);
        match instruction.name.as_str() {
            "ARG" => {
                self.arg(stage, instruction, &lookup)?;
                Self::note(stage, instruction, true);
                Ok(())
            }
            "WORKDIR" => {
                let wanted = expand(&instruction.rest)?;
                self.workdir(stage, instruction, &wanted).await
            }
            "RUN" => self.run_command(stage, instruction).await,
            "COPY" | "ADD" => {
                let words = match crate::build::instruction::json_list(&instruction.rest) {
                    Some(list) => list,
                    None => words::split(&instruction.rest, self.plan.escape),
                };
                let words = words.iter().map(|word| expand(word)).collect::<Result<Vec<_>, _>>()?;
                self.copy(stage, instruction, &words).await
            }
            other => Err(BuildError::Dockerfile(format!("{other} has no place here"))),
        }
    }

    fn arg(
        &self,
        stage: &mut Stage,
        instruction: &Instruction,
        lookup: &dyn Fn(&str) -> Option<String>,
    ) -> Result<(), BuildError> {
        for word in words::split(&instruction.rest, self.plan.escape) {
            let (name, default) = words::arg(&word).map_err(BuildError::Dockerfile)?;
            let default = default
                .map(|value| words::expand(value, self.plan.escape, lookup))
                .transpose()
                .map_err(BuildError::Dockerfile)?;
            let given = self.plan.options.build_args.get(name).cloned().flatten();
            if let Some(value) = given.or(default).or_else(|| self.plan.globals.get(name).cloned()) {
                stage.args.insert(name.to_owned(), value);
            }
        }
        Ok(())
    }

    async fn workdir(&self, stage: &mut Stage, instruction: &Instruction, wanted: &str) -> Result<(), BuildError> {
        let current = if stage.draft.config.working_dir.is_empty() { "/" } else { &stage.draft.config.working_dir };
        let dir = format!("/{}", clean(&absolute(current, wanted)).display());
        stage.draft.config.working_dir.clone_from(&dir);
        stage.key = key(&[&stage.key, "WORKDIR", &dir]);
        let failed = |error: io::Error| BuildError::Step { step: format!("WORKDIR {dir}"), reason: error.to_string() };
        let store = self.plan.engine.image_store();
        if let Some(layer) = self.plan.cached(&stage.key) {
            self.tell(BuildOutput::Cached(self.step)).await?;
            layer.filter(|layer| !layer.is_empty()).into_iter().for_each(|layer| stage.add_layer(layer));
            Self::note(stage, instruction, true);
            return Ok(());
        }
        let mounted = Mounted::new(&self.plan.engine, &stage.layers).map_err(failed)?;
        let there = sys::open_in_root(&mounted.root(), &clean(&dir)).is_ok();
        if there {
            Self::note(stage, instruction, true);
            return self.plan.remember(&stage.key, "");
        }
        sys::ensure_dir(&mounted.root(), &clean(&dir), Some((0, 0))).map_err(failed)?;
        let layer = mounted.seal(store).map_err(failed)?;
        self.plan.remember(&stage.key, &layer)?;
        stage.add_layer(layer);
        Self::note(stage, instruction, false);
        Ok(())
    }

    /// Writes down what was done, for the image's history.
    pub(super) fn note(stage: &mut Stage, instruction: &Instruction, empty_layer: bool) {
        let text = match instruction.name.as_str() {
            "RUN" => {
                // With its arguments and their number in front, as clients take them apart.
                let args: Vec<String> = args(stage).collect();
                let front =
                    if args.is_empty() { String::new() } else { format!("|{} {} ", args.len(), args.join(" ")) };
                front + &stage.draft.command(&instruction.rest).join(" ")
            }
            name => format!("/bin/sh -c #(nop)  {name} {}{}", instruction.written_flags(), instruction.rest),
        };
        stage.history.push(HistoryEntry {
            created: Some(now().to_string()),
            created_by: text,
            empty_layer,
            ..HistoryEntry::default()
        });
    }
}

pub(super) fn absolute(base: &str, path: &str) -> String {
    if path.starts_with('/') { path.to_owned() } else { format!("{}/{path}", base.trim_end_matches('/')) }
}

pub(super) fn key(parts: &[&str]) -> String {
    let mut hash = Sha256::new();
    for part in parts {
        hash.update((part.len() as u64).to_le_bytes());
        hash.update(part);
    }
    hex::encode(hash.finalize())
}
