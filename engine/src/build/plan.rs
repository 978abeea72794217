//! What a Dockerfile asks for, and the order it is done in: its stages, which of them are needed, and the cache of
//! the layers that steps came to.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tokio::sync::mpsc;
use tokio::task::JoinSet;

use crate::build::builder::{BuildError, BuildOptions, BuildOutput, Builder, Stage, key};
use crate::build::context::{Sources, clean};
use crate::build::mounting;
use crate::build::parse::{self, Dockerfile, Instruction};
use crate::build::words;
use crate::engine::{Engine, now};
use crate::image::store::{ConfigBlob, Image, RootFs};
use crate::image::{Platform, familiar, normalize, short};

/// Lines of one stage that wait for those of the stages before it.
const LINES_AHEAD: usize = 1024;
/// Stages mostly wait for what they run.
const PARALLEL_MIN: usize = 4;

/// A stage as it is written.
pub(super) struct Written {
    pub(super) from: Instruction,
    /// After `AS`, in lower case.
    name: Option<String>,
    pub(super) body: Vec<Instruction>,
}

/// A Dockerfile as it is to be built.
pub(super) struct Plan {
    pub(super) engine: Arc<Engine>,
    pub(super) options: BuildOptions,
    pub(super) context: Sources,
    /// The layers that count as cached; none: all.
    counted: Option<BTreeSet<String>>,
    pub(super) escape: char,
    /// ARGs before the first FROM.
    global_args: Vec<Instruction>,
    pub(super) globals: BTreeMap<String, String>,
    pub(super) written: Vec<Written>,
    needed: BTreeSet<usize>,
    /// Of the stages that are needed.
    pub(super) steps: usize,
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
        let dockerfile_dir = options.dockerfile_dir.as_deref().unwrap_or(context);
        let text = read_dockerfile(dockerfile_dir, name)?;
        let file = parse::dockerfile(&text).map_err(BuildError::Dockerfile)?;
        let tags: BTreeSet<String> = options
            .tags
            .iter()
            .map(|tag| {
                normalize(tag).ok_or_else(|| BuildError::Dockerfile(format!("invalid reference format: {tag:?}")))
            })
            .collect::<Result<_, _>>()?;
        let context = Sources::context(context, dockerfile_dir, name)
            .map_err(|error| BuildError::Dockerfile(format!(".dockerignore: {error}")))?;
        let plan = Arc::new(Plan::new(self.clone(), options.clone(), context, file)?);
        let stage = run(&plan, output).await?;
        if stage.layers.is_empty() && stage.history.is_empty() && options.labels.is_empty() {
            return Err(BuildError::Dockerfile(
                "No image was generated: the Dockerfile has no instruction but FROM scratch".into(),
            ));
        }
        let image = plan.keep(stage, tags.clone())?;
        let tell = async |what| output.send(what).await.map_err(|_| BuildError::GivenUp);
        if let Some(names) = plan.unused_args() {
            let text = format!("[Warning] One or more build-args [{names}] were not consumed\n");
            tell(BuildOutput::Text(text)).await?;
        }
        tell(BuildOutput::Image(image.id.clone())).await?;
        tell(BuildOutput::Text(format!("Successfully built {}\n", short(&image.id)))).await?;
        for tag in &tags {
            tell(BuildOutput::Text(format!("Successfully tagged {}\n", familiar(tag)))).await?;
        }
        tags.iter().for_each(|tag| self.tell_image("tag", &image.id, tag));
        Ok(image)
    }
}

/// Builds the stages that are needed, those beside each other that do not need each other. What each says is told
/// in the order of the file, as if one came after the other, unless it is wanted at once.
async fn run(plan: &Arc<Plan>, output: &mpsc::Sender<BuildOutput>) -> Result<Stage, BuildError> {
    let target = plan.target()?;
    let mut waiting = BTreeMap::new();
    let mut told = Vec::new();
    let mut step = 0;
    for &number in &plan.needed {
        if plan.options.at_once {
            waiting.insert(number, (step, output.clone()));
        } else {
            let (output, lines) = mpsc::channel(LINES_AHEAD);
            waiting.insert(number, (step, output));
            told.push(lines);
        }
        step += plan.steps_of(number);
    }
    let relay = async {
        for mut lines in told {
            while let Some(line) = lines.recv().await {
                if output.send(line).await.is_err() {
                    // The client is gone: stages give up at their next word.
                    return;
                }
            }
        }
    };
    let build = async {
        let most = std::thread::available_parallelism().map_or(PARALLEL_MIN, |cores| cores.get().max(PARALLEL_MIN));
        let (mut under_way, mut done) = (JoinSet::new(), BTreeMap::<usize, Stage>::new());
        loop {
            let ready = |number: &usize| plan.uses(*number).iter().all(|used| done.contains_key(used));
            let next = waiting.keys().copied().find(|number| under_way.len() < most && ready(number));
            if let Some((number, (step, output))) = next.and_then(|number| waiting.remove_entry(&number)) {
                let used = plan.uses(number).into_iter().filter_map(|used| Some((used, done.get(&used)?.clone())));
                let builder = Builder { plan: plan.clone(), number, done: used.collect(), output, step, place: 0 };
                under_way.spawn(async move { (number, builder.stage().await) });
                continue;
            }
            match under_way.join_next().await {
                Some(Ok((number, Ok(stage)))) => drop(done.insert(number, stage)),
                Some(Ok((_, Err(error)))) => {
                    // The others' words are of no use any more, nor are they.
                    waiting.clear();
                    under_way.shutdown().await;
                    break Err(error);
                }
                Some(Err(error)) => match error.try_into_panic() {
                    Ok(panic) => std::panic::resume_unwind(panic),
                    // The daemon is on its way down.
                    Err(_) => break Err(BuildError::GivenUp),
                },
                None => break Ok(done.remove(&target).unwrap_or_default()),
            }
        }
    };
    let (built, ()) = tokio::join!(build, relay);
    let mut stage = built?;
    stage.draft.config.labels.extend(plan.options.labels.clone());
    Ok(stage)
}

/// What ARGs may say of the platform that is built on, and of that which is built for.
fn platform_args(target: &Platform) -> BTreeMap<String, String> {
    let parts = |of: &str, platform: &Platform| {
        [
            (format!("{of}PLATFORM"), platform.to_string()),
            (format!("{of}OS"), platform.os.clone()),
            (format!("{of}ARCH"), platform.architecture.clone()),
            (format!("{of}VARIANT"), platform.variant.clone()),
        ]
    };
    parts("BUILD", &Platform::own()).into_iter().chain(parts("TARGET", target)).collect()
}

/// Arguments that may be given without an ARG.
fn is_predefined(name: &str) -> bool {
    let name = name.to_ascii_lowercase();
    matches!(name.as_str(), "http_proxy" | "https_proxy" | "ftp_proxy" | "no_proxy" | "all_proxy")
}

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

impl Plan {
    fn new(engine: Arc<Engine>, options: BuildOptions, context: Sources, file: Dockerfile) -> Result<Self, BuildError> {
        let counted = (!options.cache_from.is_empty()).then(|| layers_of(&engine, &options.cache_from));
        let escape = file.escape;
        let globals = platform_args(&options.platform.clone().unwrap_or_else(Platform::own));
        let mut plan = Self {
            engine,
            options,
            context,
            counted,
            escape,
            global_args: Vec::new(),
            globals,
            written: Vec::new(),
            needed: BTreeSet::new(),
            steps: 0,
        };
        for instruction in file.instructions {
            match (instruction.name.as_str(), plan.written.last_mut()) {
                ("FROM", _) => {
                    let words: Vec<&str> = instruction.rest.split_whitespace().collect();
                    let name = match words.as_slice() {
                        [_] => None,
                        [_, word, name] if word.eq_ignore_ascii_case("as") => Some(name.to_lowercase()),
                        _ => return Err(BuildError::Dockerfile("FROM requires either one or three arguments".into())),
                    };
                    plan.written.push(Written { from: instruction, name, body: Vec::new() });
                }
                (_, Some(stage)) => stage.body.push(instruction),
                ("ARG", None) => {
                    plan.global_arg(&instruction)?;
                    plan.global_args.push(instruction);
                }
                (name, None) => {
                    return Err(BuildError::Dockerfile(format!(
                        "no build stage in current context: {name} comes before FROM"
                    )));
                }
            }
        }
        plan.needed = plan.needed_for(plan.target()?);
        plan.steps = plan.needed.iter().map(|&number| plan.steps_of(number)).sum();
        Ok(plan)
    }

    /// The stage to build.
    fn target(&self) -> Result<usize, BuildError> {
        let wanted = &self.options.target;
        let wrong = |text: String| BuildError::Dockerfile(text);
        if wanted.is_empty() {
            let last = self.written.len().checked_sub(1);
            return last.ok_or_else(|| wrong("no FROM: the Dockerfile has no stage".into()));
        }
        self.stage_of(wanted, self.written.len()).ok_or_else(|| {
            wrong(format!("target stage {wanted:?} could not be found: no stage of the Dockerfile is called so"))
        })
    }

    /// What a stage is called where steps are told of.
    pub(super) fn stage_name(&self, number: usize) -> String {
        match &self.written[number].name {
            Some(name) => name.clone(),
            None if self.written.len() == 1 => String::new(),
            None => format!("stage-{number}"),
        }
    }

    fn steps_of(&self, number: usize) -> usize {
        1 + self.written[number].body.len()
    }

    fn global_arg(&mut self, instruction: &Instruction) -> Result<(), BuildError> {
        let globals = self.globals.clone();
        for word in words::split(&instruction.rest, self.escape) {
            let (name, default) = words::arg(&word).map_err(BuildError::Dockerfile)?;
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

    /// The number of the stage that a name or number stands for, among the first `before`.
    pub(super) fn stage_of(&self, name: &str, before: usize) -> Option<usize> {
        let lower = name.to_lowercase();
        let named = self.written[..before].iter().rposition(|stage| stage.name.as_deref() == Some(lower.as_str()));
        named.or_else(|| name.parse().ok().filter(|&number: &usize| number < before))
    }

    /// The stages that `target` needs, itself included.
    fn needed_for(&self, target: usize) -> BTreeSet<usize> {
        let (mut needed, mut open) = (BTreeSet::new(), vec![target]);
        while let Some(number) = open.pop() {
            if !needed.insert(number) {
                continue;
            }
            open.extend(self.uses(number));
        }
        needed
    }

    /// The stages that one begins with or copies from.
    fn uses(&self, number: usize) -> BTreeSet<usize> {
        let stage = &self.written[number];
        let base = self.base_name(stage).ok();
        let copied = stage.body.iter().flat_map(|instruction| &instruction.flags);
        let froms = copied.filter(|(flag, _)| flag == "from").map(|(_, value)| value.clone());
        let mounted = stage.body.iter().flat_map(mounting::origins);
        base.into_iter().chain(froms).chain(mounted).filter_map(|name| self.stage_of(&name, number)).collect()
    }

    pub(super) fn base_name(&self, stage: &Written) -> Result<String, BuildError> {
        let word = stage.from.rest.split_whitespace().next().unwrap_or_default();
        words::expand(word, self.escape, &|name| self.globals.get(name).cloned()).map_err(BuildError::Dockerfile)
    }

    /// What a stage is for: what its FROM says, or else the whole build.
    pub(super) fn platform(&self, stage: &Written) -> Result<Option<Platform>, BuildError> {
        let mut platform = self.options.platform.clone();
        for (flag, value) in &stage.from.flags {
            if flag != "platform" {
                return Err(BuildError::Dockerfile(format!(
                    "unknown flag for FROM: --{flag}: only --platform is known"
                )));
            }
            let value = words::expand(value, self.escape, &|name| self.globals.get(name).cloned());
            let value = value.map_err(BuildError::Dockerfile)?;
            let parsed = value.parse().map_err(|error| BuildError::Dockerfile(format!("FROM --platform: {error}")));
            platform = Some(parsed?);
        }
        Ok(platform)
    }

    /// The build arguments that no ARG of the needed stages declares, and that are not for proxies.
    fn unused_args(&self) -> Option<String> {
        let in_stages = self.needed.iter().flat_map(|&number| &self.written[number].body);
        let declared: BTreeSet<String> = in_stages
            .chain(&self.global_args)
            .filter(|instruction| instruction.name == "ARG")
            .flat_map(|instruction| words::split(&instruction.rest, self.escape))
            .map(|word| word.split('=').next().unwrap_or_default().to_owned())
            .collect();
        let given = self.options.build_args.keys();
        let unused = given.filter(|name| !declared.contains(*name) && !is_predefined(name));
        let names: Vec<_> = unused.map(String::as_str).collect();
        (!names.is_empty()).then(|| names.join(" "))
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
            created: Some(Self::created(&stage)),
            config: Some(stage.draft.config),
            rootfs: RootFs { kind: "layers".into(), diff_ids: stage.layers },
            history: stage.history,
            author: stage.draft.author,
            ..ConfigBlob::of(stage.platform)
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
