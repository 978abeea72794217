//! COPY and ADD: files from the context, other stages, images, URLs or the Dockerfile itself.

use std::io;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use sha2::{Digest as _, Sha256};

use crate::build::builder::{BuildError, BuildOutput, Builder, NamedContext, Stage, absolute, key};
use crate::build::context::{Named, Sources, clean};
use crate::build::parse::Instruction;
use crate::build::stage::{self, CopyOptions, Mounted};
use crate::build::words;

impl Builder {
    pub(super) async fn copy(
        &self,
        stage: &mut Stage,
        instruction: &Instruction,
        words: &[String],
    ) -> Result<(), BuildError> {
        let Asked { options, from, checksum } = self.copy_options(stage, instruction)?;
        let [sources @ .., target] = words else {
            return Err(BuildError::Dockerfile(format!("{} requires at least two arguments", instruction.name)));
        };
        if sources.is_empty() {
            return Err(BuildError::Dockerfile(format!("{} requires at least two arguments", instruction.name)));
        }
        let working_dir = if stage.draft.config.working_dir.is_empty() { "/" } else { &stage.draft.config.working_dir };
        let target = absolute(working_dir, target);
        let step = format!("{} {}", instruction.name, instruction.rest);
        let failed = |error: io::Error| BuildError::Step { step: step.clone(), reason: error.to_string() };
        let store = self.plan.engine.image_store().clone();
        let opened = self.open(from.as_deref().unwrap_or_default()).await?;
        let sources_of = &opened.sources(&self.plan.context).excluding(&options.exclude).map_err(failed)?;
        let options = CopyOptions { keeps_owners: sources_of.has_owners(), ..options };
        let mut pieces = Pieces::default();
        for source in sources {
            if let Some(name) = source.strip_prefix("<<") {
                let name = name.trim_start_matches('-').trim_matches(['"', '\'']);
                let doc = instruction.heredocs.iter().find(|doc| doc.name == name);
                let doc = doc.ok_or_else(|| BuildError::Dockerfile(format!("{step}: heredoc {name} is missing")))?;
                let content = if doc.expands {
                    words::expand_text(&doc.content, self.plan.escape, &|name| Self::lookup(stage, name))
                        .map_err(BuildError::Dockerfile)?
                } else {
                    doc.content.clone()
                };
                pieces.files.push(Piece {
                    name: name.to_owned(),
                    content: content.into_bytes(),
                    mode: 0o644,
                    modified: SystemTime::now(),
                });
            } else if source.starts_with("http://") || source.starts_with("https://") {
                if !options.unpacks {
                    return Err(BuildError::Dockerfile(format!("{step}: source can't be a URL for COPY: use ADD")));
                }
                let piece = download(source, checksum.as_deref()).await;
                pieces.files.push(piece.map_err(|reason| BuildError::Step { step: step.clone(), reason })?);
            } else {
                let found =
                    if options.parents { sources_of.find_with_parents(source) } else { sources_of.find(source) };
                pieces.paths.extend(found.map_err(failed)?);
            }
        }
        let content = pieces.hash(sources_of).map_err(failed)?;
        let how = format!("{options:?}");
        stage.key = key(&[&stage.key, &instruction.name, &content, &target, &how]);
        if let Some(Some(layer)) = self.plan.cached(&stage.key) {
            self.tell(BuildOutput::Cached(self.step)).await?;
            stage.add_layer(layer);
            Self::note(stage, instruction, false);
            return Ok(());
        }
        let mounted = Mounted::new(&self.plan.engine, &stage.layers).map_err(failed)?;
        pieces.copy(sources_of, &mounted.root(), &target, &options).map_err(failed)?;
        let layer = tokio::task::block_in_place(|| mounted.seal(&store)).map_err(failed)?;
        self.plan.remember(&stage.key, &layer)?;
        stage.add_layer(layer);
        Self::note(stage, instruction, false);
        Ok(())
    }

    fn copy_options(&self, stage: &Stage, instruction: &Instruction) -> Result<Asked, BuildError> {
        let mut options = CopyOptions { unpacks: instruction.name == "ADD", ..CopyOptions::default() };
        let (mut from, mut checksum) = (None, None);
        for (flag, value) in &instruction.flags {
            let value = words::expand(value, self.plan.escape, &|name| Self::lookup(stage, name))
                .map_err(BuildError::Dockerfile)?;
            match flag.as_str() {
                "from" if instruction.name == "COPY" => from = Some(value),
                "checksum" if instruction.name == "ADD" => checksum = Some(value),
                "chown" => options.chown = Some(value),
                "chmod" => {
                    let wrong = |why| BuildError::Dockerfile(format!("line {}: {why}", instruction.line));
                    options.chmod = Some(value.parse().map_err(wrong)?);
                }
                "exclude" => options.exclude.push(value),
                "parents" if instruction.name == "COPY" => options.parents = is_on(&value, instruction)?,
                // Layers are never linked to what is below them here: it asks for what is the case.
                "link" => {}
                _ => {
                    return Err(BuildError::Dockerfile(format!("line {}: unknown flag --{flag}", instruction.line)));
                }
            }
        }
        Ok(Asked { options, from, checksum })
    }

    /// What `--from` names: another context, another stage, or an image.
    pub(super) async fn origin(&self, name: &str) -> Result<Origin, BuildError> {
        if let Some(NamedContext::Files(dir)) = self.plan.options.contexts.get(name) {
            return Ok(Origin::Files(dir.clone()));
        }
        if !self.plan.options.contexts.contains_key(name)
            && let Some(stage) = self.plan.stage_of(name, self.number).and_then(|other| self.done.get(&other))
        {
            return Ok(Origin::Layers(stage.layers.clone()));
        }
        let platform = self.plan.platform(&self.plan.written[self.number])?;
        Ok(Origin::Layers(self.image(name, platform.as_ref()).await?.layers))
    }

    /// Opens what `--from` names; nothing stands for the context.
    pub(super) async fn open(&self, from: &str) -> Result<Opened, BuildError> {
        if from.is_empty() {
            return Ok(Opened::default());
        }
        let failed = |error: io::Error| BuildError::Step { step: format!("opening {from}"), reason: error.to_string() };
        let origin = self.origin(from).await?;
        let (sources, mounted) = match origin {
            Origin::Files(dir) => (Sources::context(&dir, &dir, "").map_err(failed)?, None),
            Origin::Layers(layers) => {
                let mounted = Mounted::new(&self.plan.engine, &layers).map_err(failed)?;
                (Sources::whole(&mounted.root()), Some(mounted))
            }
        };
        Ok(Opened { sources: Some(sources), _mounted: mounted })
    }
}

/// A flag that is on when nothing else is said.
fn is_on(value: &str, instruction: &Instruction) -> Result<bool, BuildError> {
    match value {
        "" | "true" | "1" => Ok(true),
        "false" | "0" => Ok(false),
        other => Err(BuildError::Dockerfile(format!("line {}: {other:?} is neither true nor false", instruction.line))),
    }
}

/// What `--from` names.
pub(super) enum Origin {
    Files(PathBuf),
    Layers(Vec<String>),
}

/// What is copied from, while it is.
#[derive(Default)]
pub(super) struct Opened {
    /// None: the context's.
    sources: Option<Sources>,
    _mounted: Option<Mounted>,
}

impl Opened {
    pub(super) fn sources<'a>(&'a self, context: &'a Sources) -> &'a Sources {
        self.sources.as_ref().unwrap_or(context)
    }
}

/// What an instruction's flags ask for.
struct Asked {
    options: CopyOptions,
    from: Option<String>,
    /// What the content of a URL must come to: `sha256:HEX`.
    checksum: Option<String>,
}

/// What is copied in one step.
#[derive(Default)]
struct Pieces {
    paths: Vec<Named>,
    files: Vec<Piece>,
}

/// A file that stands in the Dockerfile itself, or comes from elsewhere.
pub(super) struct Piece {
    pub(super) name: String,
    pub(super) content: Vec<u8>,
    pub(super) mode: u32,
    pub(super) modified: SystemTime,
}

impl Pieces {
    fn hash(&self, sources: &Sources) -> io::Result<String> {
        let mut hash = Sha256::new();
        for Named { path, below } in &self.paths {
            sources.hash(path, &mut hash)?;
            hash.update(below.as_deref().unwrap_or_else(|| Path::new("")).as_os_str().as_encoded_bytes());
        }
        for piece in &self.files {
            hash.update(&piece.name);
            hash.update(&piece.content);
        }
        Ok(hex::encode(hash.finalize()))
    }

    fn copy(&self, sources: &Sources, root: &Path, target: &str, options: &CopyOptions) -> io::Result<()> {
        let several = self.paths.len() + self.files.len() > 1 && !options.parents;
        if several
            && !target.ends_with('/')
            && !crate::sys::open_in_root(root, &clean(target))
                .is_ok_and(|file| file.metadata().is_ok_and(|meta| meta.is_dir()))
        {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "when more than one file is copied, the destination must be a directory and end with a /",
            ));
        }
        if !self.paths.is_empty() {
            stage::copy(sources, &self.paths, root, target, options)?;
        }
        for piece in &self.files {
            let options = CopyOptions { unpacks: false, keeps_owners: false, ..options.clone() };
            stage::write_file(root, target, piece, &options)?;
        }
        Ok(())
    }
}

/// Fetches a file that ADD names.
async fn download(url: &str, checksum: Option<&str>) -> Result<Piece, String> {
    let path = url.split(['?', '#']).next().unwrap_or(url);
    let name = path.splitn(4, '/').nth(3).and_then(|path| path.rsplit('/').next()).filter(|name| !name.is_empty());
    let name = name.ok_or_else(|| format!("{url}: cannot determine filename from url"))?.to_owned();
    let (content, modified) = fetch_dated(url).await?;
    let digest = format!("sha256:{}", hex::encode(Sha256::digest(&content)));
    match checksum {
        Some(wanted) if wanted != digest => Err(format!("{url}: digest mismatch {digest}: {wanted}")),
        // As Docker has it: only who builds may use what came from elsewhere, until the Dockerfile says more.
        _ => Ok(Piece { name, content, mode: 0o600, modified: modified.unwrap_or(SystemTime::UNIX_EPOCH) }),
    }
}

/// Fetches what is at a URL.
pub async fn fetch(url: &str) -> Result<Vec<u8>, String> {
    Ok(fetch_dated(url).await?.0)
}

/// Fetches what is at a URL, and when that was made as far as its server says.
async fn fetch_dated(url: &str) -> Result<(Vec<u8>, Option<SystemTime>), String> {
    const LEN_MAX: usize = 1 << 30;
    let fail = |error: reqwest::Error| format!("{url}: {}", skep_api::with_causes(&error));
    let mut response = reqwest::get(url).await.and_then(reqwest::Response::error_for_status).map_err(fail)?;
    let modified = response.headers().get(reqwest::header::LAST_MODIFIED).and_then(|date| date.to_str().ok());
    let modified = modified.and_then(|date| httpdate::parse_http_date(date).ok());
    let mut content = Vec::new();
    while let Some(chunk) = response.chunk().await.map_err(fail)? {
        content.extend_from_slice(&chunk);
        if content.len() > LEN_MAX {
            return Err(format!("{url} is larger than 1 GiB"));
        }
    }
    Ok((content, modified))
}

/// Unpacks a build's context; nothing lands outside of `dir`.
pub fn unpack_context(archive: impl io::Read, dir: &Path) -> io::Result<()> {
    crate::image::unpack::unpack_files(archive, dir)
}
