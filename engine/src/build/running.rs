//! RUN: a command in a container on the layers so far; what it writes is the next layer.

use std::io;
use std::sync::Arc;

use crate::build::builder::{BuildError, BuildOutput, Builder, Stage, key};
use crate::build::mounting::{self, RunMount};
use crate::build::parse::Instruction;
use crate::build::stage;
use crate::container::config::{ContainerConfig, NetworkMode};
use crate::container::logs::config::{LogConfig, LogDriver};
use crate::engine::{Engine, RemoveOptions};

/// Arguments that need no ARG, and without one are told in no history and make no other step.
const PROXY_ARGS: [&str; 8] =
    ["HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy", "FTP_PROXY", "ftp_proxy", "NO_PROXY", "no_proxy"];

impl Builder {
    pub(super) async fn run_command(&self, stage: &mut Stage, instruction: &Instruction) -> Result<(), BuildError> {
        if let Some((flag, _)) =
            instruction.flags.iter().find(|(flag, _)| !["network", "mount"].contains(&flag.as_str()))
        {
            return Err(BuildError::Dockerfile(format!(
                "line {}: the --{flag} option requires BuildKit, which this daemon does not have: leave it out",
                instruction.line
            )));
        }
        let mounts = self.mounts(stage, instruction)?;
        let command = run_line(stage, instruction);
        let args: Vec<String> = args(stage).collect();
        stage.key = key(&[&stage.key, "RUN", &command.join("\0"), &args.join("\0"), &stage.draft.config.user]);
        if !mounts.is_empty() {
            stage.key = key(&[&stage.key, &self.mounts_key(&mounts).await?]);
        }
        if let Some(Some(layer)) = self.plan.cached(&stage.key) {
            self.tell(BuildOutput::Cached(self.step)).await?;
            stage.add_layer(layer);
            Self::note(stage, instruction, false);
            return Ok(());
        }
        let network =
            match instruction.flags.iter().find(|(flag, _)| flag == "network").map(|(_, value)| value.as_str()) {
                Some("none") => NetworkMode::None,
                Some("host") => NetworkMode::Host,
                _ => self.plan.options.network.clone(),
            };
        let proxies = self.plan.options.build_args.iter().filter(|(name, _)| PROXY_ARGS.contains(&name.as_str()));
        let proxies = proxies.filter_map(|(name, value)| Some(format!("{name}={}", value.as_ref()?)));
        let mut config = ContainerConfig {
            name: format!("build-{:016x}", rand::random::<u64>()),
            image: crate::build::BUILD_IMAGE.into(),
            args: command.clone(),
            env: stage.draft.config.env.iter().cloned().chain(args.iter().cloned()).chain(proxies).collect(),
            user: stage.draft.config.user.clone(),
            working_dir: stage.draft.config.working_dir.clone(),
            seccomp: true,
            no_new_privileges: Some(false),
            network,
            hosts: self.plan.options.hosts.clone(),
            limits: self.plan.options.limits.clone(),
            shm_size_bytes: self.plan.options.shm_size_bytes,
            cgroup_parent: self.plan.options.cgroup_parent.clone(),
            ulimits: self.plan.options.ulimits.clone(),
            log: LogConfig { driver: LogDriver::None, ..LogConfig::default() },
            ..ContainerConfig::default()
        };
        let held = self.mount(&mounts, &mut config).await?;
        let layer = self.run_container(config, stage.layers.clone(), &command, mounts).await?;
        drop(held);
        self.plan.remember(&stage.key, &layer)?;
        stage.add_layer(layer);
        Self::note(stage, instruction, false);
        Ok(())
    }

    /// Runs a command on layers; returns the layer that it wrote.
    async fn run_container(
        &self,
        config: ContainerConfig,
        layers: Vec<String>,
        command: &[String],
        mounts: Vec<RunMount>,
    ) -> Result<String, BuildError> {
        let below: Vec<_> = layers.iter().map(|layer| self.plan.engine.image_store().layer_dir(layer)).collect();
        let id = self.plan.engine.create_on(config, layers)?;
        self.tell(BuildOutput::Running(self.step, id.clone())).await?;
        let gone = Gone { engine: self.plan.engine.clone(), id: id.clone() };
        let attachment = self.plan.engine.attach(&id)?;
        self.plan.engine.start(&id).await?;
        if let Ok(mut attachment) = attachment.await {
            while let Some((stream, bytes)) = attachment.output.next().await {
                self.tell(BuildOutput::Written(self.step, stream, bytes)).await?;
            }
        }
        let exit = self.plan.engine.wait(&id).await?;
        if exit.code != 0 {
            return Err(BuildError::Command { command: command.join(" "), code: exit.code });
        }
        let dirs = self.plan.engine.container_dirs(&id)?;
        let store = self.plan.engine.image_store().clone();
        let sealed = tokio::task::spawn_blocking(move || {
            stage::seal_changes(&store, &dirs, |changed| mounting::remove_mount_points(changed, &below, &mounts))
        })
        .await;
        let layer = sealed.map_err(io::Error::other).flatten().map_err(|error| BuildError::Step {
            step: format!("keeping what '{}' wrote", command.join(" ")),
            reason: error.to_string(),
        })?;
        drop(gone);
        Ok(layer)
    }
}

/// A container of a build, gone however the step ends.
struct Gone {
    engine: Arc<Engine>,
    id: String,
}

impl Drop for Gone {
    fn drop(&mut self) {
        let (engine, id) = (self.engine.clone(), std::mem::take(&mut self.id));
        tokio::spawn(async move {
            if let Err(error) = engine.remove(&id, RemoveOptions { force: true, volumes: true }).await {
                tracing::warn!(container = %id, %error, "a build's container was not removed");
            }
        });
    }
}

/// The arguments that a command sees as variables: those that the image's own do not hide.
pub(super) fn args(stage: &Stage) -> impl Iterator<Item = String> + '_ {
    let is_hidden = |name: &str| stage.draft.config.env.iter().any(|var| var.split('=').next() == Some(name));
    stage.args.iter().filter(move |(name, _)| !is_hidden(name)).map(|(name, value)| format!("{name}={value}"))
}

fn run_line(stage: &Stage, instruction: &Instruction) -> Vec<String> {
    match instruction.heredocs.as_slice() {
        [] => stage.draft.command(&instruction.rest),
        // The heredoc is the script.
        [doc]
            if instruction.rest.trim_start_matches("<<").trim_start_matches('-').trim_matches(['"', '\''])
                == doc.name =>
        {
            match doc.content.strip_prefix("#!") {
                Some(shebang) => {
                    let interpreter = shebang.lines().next().unwrap_or("/bin/sh").trim().to_owned();
                    let mut words: Vec<String> = interpreter.split_whitespace().map(str::to_owned).collect();
                    words.extend(["-c".into(), doc.content.clone()]);
                    words
                }
                None => stage.draft.shell().into_iter().chain([doc.content.clone()]).collect(),
            }
        }
        docs => {
            let mut script = instruction.rest.clone();
            for doc in docs {
                script += &format!("\n{}{}", doc.content, doc.name);
            }
            stage.draft.shell().into_iter().chain([script]).collect()
        }
    }
}
