//! Runs a Dockerfile: stage by stage, with a cache of the layers that steps came to.
//!
//! A step's key is made of all that it depends on: what came before, the instruction with its
//! variables put in, the arguments in force, and the content it copies. The cache holds a key's
//! layer as long as some image has that; so it grows with images and goes with them.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use sha2::{Digest as _, Sha256};
use tokio::sync::mpsc;

use crate::build::context::{Sources, clean};
use crate::build::instruction::{Draft, set_env};
use crate::build::parse::{self, Dockerfile, Instruction};
use crate::build::stage::{self, Mounted};
use crate::build::words;
use crate::container::config::{NetworkMode, ResourceLimits};
use crate::engine::{Engine, EngineError, now};
use crate::image::pull::Credentials;
use crate::image::store::{ConfigBlob, HistoryEntry, Image, RootFs};
use crate::image::{architecture, familiar, normalize};

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
    pub network: NetworkMode,
    /// Lines `IP name…` for /etc/hosts.
    pub hosts: Vec<String>,
    pub limits: ResourceLimits,
    pub shm_size_bytes: i64,
    /// By registry.
    pub credentials: BTreeMap<String, Credentials>,
}

/// What a build tells while it runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BuildOutput {
    Text(String),
    /// The image it came to.
    Image(String),
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

/// A stage as it is written.
struct Written {
    from: Instruction,
    /// After `AS`, in lower case.
    name: Option<String>,
    body: Vec<Instruction>,
}

/// A stage under way, or done.
#[derive(Clone, Default)]
pub(super) struct Stage {
    pub(super) draft: Draft,
    pub(super) layers: Vec<String>,
    history: Vec<HistoryEntry>,
    /// ARGs in force.
    pub(super) args: BTreeMap<String, String>,
    /// Digest of all that its state depends on.
    pub(super) key: String,
}

pub(super) struct Builder<'a> {
    pub(super) engine: &'a Arc<Engine>,
    pub(super) options: &'a BuildOptions,
    pub(super) context: Sources,
    /// The layers that count as cached; none: all.
    counted: Option<BTreeSet<String>>,
    output: &'a mpsc::Sender<BuildOutput>,
    pub(super) escape: char,
    /// ARGs before the first FROM.
    globals: BTreeMap<String, String>,
    written: Vec<Written>,
    pub(super) done: BTreeMap<usize, Stage>,
    step: usize,
    steps: usize,
}

impl Engine {
    /// Builds an image from the context that lies in `context`.
    pub async fn build(
        self: &Arc<Self>,
        context: &Path,
        options: &BuildOptions,
        output: &mpsc::Sender<BuildOutput>,
    ) -> Result<Image, BuildError> {
        let _under_way = self.layers_under_way().await;
        let name = if options.dockerfile.is_empty() { "Dockerfile" } else { &options.dockerfile };
        let text = read_dockerfile(context, name)?;
        let file = parse::dockerfile(&text).map_err(BuildError::Dockerfile)?;
        let tags: BTreeSet<String> = options
            .tags
            .iter()
            .map(|tag| {
                normalize(tag).ok_or_else(|| BuildError::Dockerfile(format!("invalid reference format: {tag:?}")))
            })
            .collect::<Result<_, _>>()?;
        let context = Sources::context(context, name)
            .map_err(|error| BuildError::Dockerfile(format!(".dockerignore: {error}")))?;
        let mut builder = Builder::new(self, options, context, output, file)?;
        let stage = builder.run().await?;
        let image = builder.keep(stage, tags.clone())?;
        output.send(BuildOutput::Image(image.id.clone())).await.map_err(|_| BuildError::GivenUp)?;
        builder.tell(format!("Successfully built {}\n", short(&image.id))).await?;
        for tag in &tags {
            builder.tell(format!("Successfully tagged {}\n", familiar(tag))).await?;
        }
        self.tell_image("build", &image.id, tags.iter().next().map_or("", String::as_str));
        Ok(image)
    }
}

/// What a step says that was done before.
pub(super) const USING_CACHE: &str = " ---> Using cache\n";

fn layers_of(engine: &Engine, images: &[String]) -> BTreeSet<String> {
    images.iter().filter_map(|name| engine.image(name).ok()).flat_map(|image| image.layers).collect()
}

/// Says what is wrong with a Dockerfile before anything is built.
pub fn check_dockerfile(context: &Path, name: &str) -> Result<(), BuildError> {
    let name = if name.is_empty() { "Dockerfile" } else { name };
    let text = read_dockerfile(context, name)?;
    parse::dockerfile(&text).map(drop).map_err(BuildError::Dockerfile)
}

fn read_dockerfile(context: &Path, name: &str) -> Result<String, BuildError> {
    use std::io::Read as _;
    const LEN_MAX: u64 = 4 << 20;
    let mut text = String::new();
    crate::sys::open_in_root(context, &clean(name))
        .and_then(|file| file.take(LEN_MAX).read_to_string(&mut text))
        .map_err(|error| BuildError::Dockerfile(format!("Cannot locate specified Dockerfile: {name}: {error}")))?;
    Ok(text)
}

pub(super) fn short(id: &str) -> &str {
    let hex = id.strip_prefix("sha256:").unwrap_or(id);
    &hex[..hex.len().min(12)]
}

impl<'a> Builder<'a> {
    fn new(
        engine: &'a Arc<Engine>,
        options: &'a BuildOptions,
        context: Sources,
        output: &'a mpsc::Sender<BuildOutput>,
        file: Dockerfile,
    ) -> Result<Self, BuildError> {
        let mut builder = Self {
            engine,
            options,
            context,
            counted: (!options.cache_from.is_empty()).then(|| layers_of(engine, &options.cache_from)),
            output,
            escape: file.escape,
            globals: BTreeMap::new(),
            written: Vec::new(),
            done: BTreeMap::new(),
            step: 0,
            steps: 0,
        };
        for instruction in file.instructions {
            match (instruction.name.as_str(), builder.written.last_mut()) {
                ("FROM", _) => {
                    let words: Vec<&str> = instruction.rest.split_whitespace().collect();
                    let name = match words.as_slice() {
                        [_] => None,
                        [_, word, name] if word.eq_ignore_ascii_case("as") => Some(name.to_lowercase()),
                        _ => return Err(BuildError::Dockerfile("FROM requires either one or three arguments".into())),
                    };
                    builder.written.push(Written { from: instruction, name, body: Vec::new() });
                }
                (_, Some(stage)) => stage.body.push(instruction),
                ("ARG", None) => builder.global_arg(&instruction)?,
                (name, None) => {
                    return Err(BuildError::Dockerfile(format!(
                        "no build stage in current context: {name} comes before FROM"
                    )));
                }
            }
        }
        Ok(builder)
    }

    fn global_arg(&mut self, instruction: &Instruction) -> Result<(), BuildError> {
        let globals = self.globals.clone();
        for word in words::split(&instruction.rest, self.escape) {
            let (name, default) =
                word.split_once('=').map_or((word.as_str(), None), |(name, value)| (name, Some(value)));
            let default = default
                .map(|value| words::expand(value, self.escape, &|name| globals.get(name).cloned()))
                .transpose()
                .map_err(BuildError::Dockerfile)?;
            let given = self.options.build_args.get(name).cloned().flatten();
            if let Some(value) = given.or(default) {
                self.globals.insert(name.to_owned(), value);
            }
        }
        Ok(())
    }

    pub(super) async fn tell(&self, text: String) -> Result<(), BuildError> {
        self.output.send(BuildOutput::Text(text)).await.map_err(|_| BuildError::GivenUp)
    }

    /// The number of the stage that a name or number stands for, among the first `before`.
    pub(super) fn stage_of(&self, name: &str, before: usize) -> Option<usize> {
        let lower = name.to_lowercase();
        let named = self.written[..before].iter().rposition(|stage| stage.name.as_deref() == Some(lower.as_str()));
        named.or_else(|| name.parse().ok().filter(|&number: &usize| number < before))
    }

    /// The stages that `target` needs, itself included.
    fn needed(&self, target: usize) -> BTreeSet<usize> {
        let (mut needed, mut open) = (BTreeSet::new(), vec![target]);
        while let Some(number) = open.pop() {
            if !needed.insert(number) {
                continue;
            }
            let stage = &self.written[number];
            let base = self.base_name(stage).ok();
            let copied = stage.body.iter().flat_map(|instruction| &instruction.flags);
            let froms = copied.filter(|(flag, _)| flag == "from").map(|(_, value)| value.clone());
            open.extend(base.into_iter().chain(froms).filter_map(|name| self.stage_of(&name, number)));
        }
        needed
    }

    fn base_name(&self, stage: &Written) -> Result<String, BuildError> {
        let word = stage.from.rest.split_whitespace().next().unwrap_or_default();
        words::expand(word, self.escape, &|name| self.globals.get(name).cloned()).map_err(BuildError::Dockerfile)
    }

    async fn run(&mut self) -> Result<Stage, BuildError> {
        let target = if self.options.target.is_empty() {
            self.written
                .len()
                .checked_sub(1)
                .ok_or_else(|| BuildError::Dockerfile("no FROM: the Dockerfile has no stage".into()))?
        } else {
            let wanted = &self.options.target;
            self.stage_of(wanted, self.written.len()).ok_or_else(|| {
                BuildError::Dockerfile(format!(
                    "failed to reach build target {wanted} in Dockerfile: no stage is called so"
                ))
            })?
        };
        let needed = self.needed(target);
        self.steps = needed.iter().map(|&number| 1 + self.written[number].body.len()).sum();
        for number in needed {
            let stage = self.stage(number).await?;
            self.done.insert(number, stage);
        }
        let mut stage = self.done.remove(&target).unwrap_or_default();
        if !self.options.labels.is_empty() {
            stage.draft.config.labels.extend(self.options.labels.clone());
        }
        Ok(stage)
    }

    async fn stage(&mut self, number: usize) -> Result<Stage, BuildError> {
        let from = self.written[number].from.clone();
        self.next_step(&from).await?;
        let base = self.base_name(&self.written[number])?;
        let mut stage = self.base(&base, number).await?;
        self.tell(format!(" ---> {}\n", short(&stage.key))).await?;
        let triggers = std::mem::take(&mut stage.draft.config.on_build);
        if !triggers.is_empty() {
            self.tell(format!("# Executing {} build triggers\n", triggers.len())).await?;
        }
        for trigger in triggers {
            let instruction = parse::instruction(from.line, &trigger).map_err(BuildError::Dockerfile)?;
            self.apply(&mut stage, number, &instruction).await?;
        }
        for instruction in self.written[number].body.clone() {
            self.next_step(&instruction).await?;
            self.apply(&mut stage, number, &instruction).await?;
            self.tell(format!(" ---> {}\n", short(&stage.key))).await?;
        }
        Ok(stage)
    }

    async fn next_step(&mut self, instruction: &Instruction) -> Result<(), BuildError> {
        self.step += 1;
        let flags: String = instruction.flags.iter().map(|(key, value)| format!("--{key}={value} ")).collect();
        let text = format!("Step {}/{} : {} {flags}{}\n", self.step, self.steps, instruction.name, instruction.rest);
        self.tell(text).await
    }

    /// What a stage begins with: nothing, another stage, or an image.
    async fn base(&self, name: &str, number: usize) -> Result<Stage, BuildError> {
        if name == "scratch" {
            return Ok(Stage { key: key(&["scratch"]), ..Stage::default() });
        }
        if let Some(other) = self.stage_of(name, number).and_then(|other| self.done.get(&other)) {
            let mut stage = other.clone();
            stage.args.clear();
            stage.draft.cmd_is_own = false;
            return Ok(stage);
        }
        let image = self.image(name).await?;
        let store = self.engine.image_store();
        let blob: Option<ConfigBlob> =
            store.config_blob(&image.id).ok().and_then(|raw| serde_json::from_slice(&raw).ok());
        let mut draft = Draft { config: image.config.clone(), ..Draft::default() };
        if !draft.config.env.iter().any(|var| var.starts_with("PATH=")) {
            set_env(&mut draft.config.env, "PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin");
        }
        Ok(Stage {
            draft,
            layers: image.layers.clone(),
            history: blob.map(|blob| blob.history).unwrap_or_default(),
            args: BTreeMap::new(),
            key: image.id.trim_start_matches("sha256:").to_owned(),
        })
    }

    pub(super) async fn image(&self, name: &str) -> Result<Image, BuildError> {
        match self.engine.image(name) {
            Ok(image) if !self.options.pull || normalize(name) == normalize(crate::image::builtin::WHOAMI) => Ok(image),
            _ => {
                let registry = name.split('/').next().unwrap_or_default();
                let credentials = self.options.credentials.get(registry).cloned().unwrap_or_default();
                let (progress, mut steps) = mpsc::channel(64);
                let drain = async { while steps.recv().await.is_some() {} };
                let pulled = async {
                    let pulled = self.engine.pull(name, &credentials, &progress).await;
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

    async fn apply(&mut self, stage: &mut Stage, number: usize, instruction: &Instruction) -> Result<(), BuildError> {
        let before = stage.clone();
        let lookup = |name: &str| Self::lookup(&before, name);
        if let Some(applied) = stage.draft.apply(instruction, self.escape, &lookup) {
            applied.map_err(BuildError::Dockerfile)?;
            let state = serde_json::to_string(&stage.draft.config).unwrap_or_default();
            stage.key = key(&[&before.key, &instruction.name, &state]);
            if self.cached(&stage.key).is_some() {
                self.tell(USING_CACHE.into()).await?;
            } else {
                self.remember(&stage.key, "")?;
            }
            Self::note(stage, instruction, true);
            return Ok(());
        }
        let expand = |word: &str| words::expand(word, self.escape, &lookup).map_err(BuildError::Dockerfile);
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
                    None => words::split(&instruction.rest, self.escape),
                };
                let words = words.iter().map(|word| expand(word)).collect::<Result<Vec<_>, _>>()?;
                self.copy(stage, number, instruction, &words).await
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
        for word in words::split(&instruction.rest, self.escape) {
            let (name, default) =
                word.split_once('=').map_or((word.as_str(), None), |(name, value)| (name, Some(value)));
            let default = default
                .map(|value| words::expand(value, self.escape, lookup))
                .transpose()
                .map_err(BuildError::Dockerfile)?;
            let given = self.options.build_args.get(name).cloned().flatten();
            if let Some(value) = given.or(default).or_else(|| self.globals.get(name).cloned()) {
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
        let store = self.engine.image_store();
        if let Some(layer) = self.cached(&stage.key) {
            self.tell(USING_CACHE.into()).await?;
            stage.layers.extend(layer.filter(|layer| !layer.is_empty()));
            Self::note(stage, instruction, true);
            return Ok(());
        }
        let mounted = Mounted::new(store, &stage.layers).map_err(failed)?;
        let there = crate::sys::open_in_root(&mounted.root(), &clean(&dir)).is_ok();
        if there {
            Self::note(stage, instruction, true);
            return self.remember(&stage.key, "");
        }
        stage::ensure_dir(&mounted.root(), &clean(&dir), Some((0, 0))).map_err(failed)?;
        let layer = mounted.seal(store).map_err(failed)?;
        self.remember(&stage.key, &layer)?;
        stage.layers.push(layer);
        Self::note(stage, instruction, false);
        Ok(())
    }

    /// Writes down what was done, for the image's history.
    pub(super) fn note(stage: &mut Stage, instruction: &Instruction, empty_layer: bool) {
        let flags: String = instruction.flags.iter().map(|(key, value)| format!("--{key}={value} ")).collect();
        let text = match instruction.name.as_str() {
            "RUN" => stage.draft.command(&instruction.rest).join(" "),
            name => format!("/bin/sh -c #(nop)  {name} {flags}{}", instruction.rest),
        };
        stage.history.push(HistoryEntry {
            created: Some(now().to_string()),
            created_by: text,
            empty_layer,
            ..HistoryEntry::default()
        });
    }

    fn cache_path(&self, key: &str) -> PathBuf {
        self.engine.image_store().dir().join("cache").join(key)
    }

    /// The layer that a step came to before, if that is still here; some came to none.
    pub(super) fn cached(&self, key: &str) -> Option<Option<String>> {
        if self.options.no_cache {
            return None;
        }
        let layer = fs::read_to_string(self.cache_path(key)).ok()?;
        if layer.is_empty() {
            return self.counted.as_ref().is_none_or(|counted| !counted.is_empty()).then_some(None);
        }
        let counts = self.counted.as_ref().is_none_or(|counted| counted.contains(&layer));
        (counts && self.engine.image_store().has_layer(&layer)).then_some(Some(layer))
    }

    pub(super) fn remember(&self, key: &str, layer: &str) -> Result<(), BuildError> {
        let path = self.cache_path(key);
        let written = fs::create_dir_all(path.parent().unwrap_or_else(|| Path::new("/"))).and_then(|()| match layer {
            // Of no worth but to say that it was done before.
            "" => crate::disk::write_passing(&path, b""),
            layer => crate::disk::write_whole(&path, layer.as_bytes()),
        });
        written.map_err(|error| BuildError::Step { step: "remembering a step".into(), reason: error.to_string() })
    }

    /// Keeps what a stage came to as an image; the one that it came to before, if nothing differs.
    fn keep(&self, stage: Stage, tags: BTreeSet<String>) -> Result<Image, BuildError> {
        let failed =
            |error: io::Error| BuildError::Step { step: "keeping the image".into(), reason: error.to_string() };
        let labels = serde_json::to_string(&stage.draft.config.labels).unwrap_or_default();
        let made_from = key(&[&stage.key, &labels, &stage.draft.author, "image"]);
        let before = fs::read_to_string(self.cache_path(&made_from)).ok().filter(|_| !self.options.no_cache);
        if let Some(image) = before.and_then(|id| self.engine.image(&id).ok()) {
            for tag in tags {
                self.engine.image_store().tag(&image.id, tag).map_err(failed)?;
            }
            return Ok(self.engine.image(&image.id)?);
        }
        let blob = ConfigBlob {
            architecture: architecture().into(),
            os: "linux".into(),
            created: Some(Self::created(&stage)),
            config: Some(stage.draft.config),
            rootfs: RootFs { kind: "layers".into(), diff_ids: stage.layers },
            history: stage.history,
            author: stage.draft.author,
            ..ConfigBlob::default()
        };
        let raw = serde_json::to_vec(&blob).map_err(|error| failed(error.into()))?;
        let image = self.engine.image_store().keep_config(&raw, tags, BTreeSet::new()).map_err(failed)?;
        self.remember(&made_from, &image.id)?;
        Ok(image)
    }

    fn created(stage: &Stage) -> String {
        stage.history.last().and_then(|entry| entry.created.clone()).unwrap_or_else(|| now().to_string())
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
