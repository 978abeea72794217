//! `skep stack …`: the services, networks, secrets and configs of a compose file, as one.

mod cluster_volume;
mod deploy;
mod document;
mod interpolation;
mod merge;
mod mounts;
mod project;
mod service;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use serde_json::{Value, json};

use self::document::Node;
use self::project::{NAMESPACE_LABEL, Project};
use super::service::{self as services, TasksArgs, task_rows};
use crate::client::{Client, escape};
use crate::output::{ListArgs, line};

/// Between looks at whether a stack's tasks are gone.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// How long tasks may take to end before it is said that they do not.
const GONE_LIMIT: Duration = Duration::from_secs(120);

#[derive(clap::Subcommand)]
pub(crate) enum StackCommand {
    /// Bring a stack up, or up to what its file says now
    #[command(visible_alias = "up")]
    Deploy(deploy::DeployArgs),
    /// List the stacks
    #[command(visible_alias = "list")]
    Ls(ListArgs),
    /// List the tasks of a stack
    Ps {
        stack: String,
        #[command(flatten)]
        tasks: TasksArgs,
    },
    /// List the services of a stack
    Services {
        stack: String,
        #[command(flatten)]
        list: ListArgs,
    },
    /// Remove stacks, and wait until their tasks are gone
    #[command(visible_aliases = ["remove", "down"])]
    Rm {
        /// Return at once; networks that are in use until then are left
        #[arg(short, long, num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value = "false", value_name = "BOOL", hide_default_value = true)]
        detach: bool,
        #[arg(required = true)]
        stacks: Vec<String>,
    },
    /// Show what files say together, with all variables filled in
    Config {
        #[command(flatten)]
        files: FileArgs,
        /// Leave variables as they are
        #[arg(long)]
        skip_interpolation: bool,
    },
}

#[derive(clap::Args)]
pub(crate) struct FileArgs {
    /// A compose file, or - for standard input; what later ones say counts (repeatable)
    #[arg(short, long = "compose-file", value_name = "FILE", required = true)]
    compose_file: Vec<PathBuf>,
}

pub(crate) async fn run(client: &Client, command: StackCommand) -> anyhow::Result<()> {
    match command {
        StackCommand::Deploy(args) => deploy::run(client, args).await,
        StackCommand::Ls(args) => list(client, &args).await,
        StackCommand::Ps { stack, tasks } => {
            services_of(client, &stack, true).await?;
            let mut filters = tasks.list.filters()?;
            filters["label"] = json!([label(&stack)]);
            task_rows(client, &filters, &tasks).await
        }
        StackCommand::Services { stack, list } => {
            services_of(client, &stack, true).await?;
            let mut filters = list.filters()?;
            crate::commands::values::push(&mut filters["label"], json!(label(&stack)));
            services::list(client, &filters, &list).await
        }
        StackCommand::Rm { detach, stacks } => {
            for stack in stacks {
                remove(client, &stack, detach).await?;
            }
            Ok(())
        }
        StackCommand::Config { files, skip_interpolation } => {
            let merged = files.read(skip_interpolation)?;
            line(serde_saphyr::to_string(&merged)?.trim_end())
        }
    }
}

impl FileArgs {
    /// What the files say together.
    fn read(&self, skip_interpolation: bool) -> anyhow::Result<Node> {
        let mut merged: Option<Node> = None;
        let mut unset = Vec::new();
        for path in &self.compose_file {
            let is_input = path == Path::new("-");
            let text = match is_input {
                true => std::io::read_to_string(std::io::stdin()),
                false => std::fs::read_to_string(path),
            };
            let file = path.display().to_string();
            let mut node = Node::parse(&file, &text.with_context(|| format!("{file} cannot be read"))?)?;
            if !skip_interpolation {
                interpolation::interpolate(&mut node, "", &|name| std::env::var(name).ok(), &mut unset)?;
            }
            merged = Some(match merged {
                Some(before) => merge::merge("", before, node),
                None => node,
            });
        }
        for name in unset {
            eprintln!("variable {name} is not set: it is taken for empty");
        }
        merged.context("no compose file is given: name one with -c FILE")
    }

    /// Where the paths of the files begin.
    fn dir(&self) -> anyhow::Result<PathBuf> {
        let first = self.compose_file.first().filter(|path| *path != Path::new("-"));
        let dir = first.and_then(|path| path.parent()).unwrap_or_else(|| Path::new(""));
        Ok(std::env::current_dir()?.join(dir))
    }

    /// What a stack of that name is made of.
    fn project(&self, stack: &str) -> anyhow::Result<Project> {
        Project::read(stack, &self.dir()?, &self.read(false)?)
    }
}

fn label(stack: &str) -> String {
    format!("{NAMESPACE_LABEL}={stack}")
}

/// Objects that carry a stack's label.
async fn labelled(client: &Client, kind: &str, stack: &str) -> anyhow::Result<Vec<Value>> {
    let filters = json!({"label": [label(stack)]}).to_string();
    let found = client.get(&format!("/{kind}?filters={}", escape(&filters))).await?;
    Ok(found.as_array().cloned().unwrap_or_default())
}

async fn services_of(client: &Client, stack: &str, is_needed: bool) -> anyhow::Result<Vec<Value>> {
    let services = labelled(client, "services", stack).await?;
    anyhow::ensure!(!services.is_empty() || !is_needed, "stack {stack} has no services: see 'skep stack ls'");
    Ok(services)
}

async fn list(client: &Client, args: &ListArgs) -> anyhow::Result<()> {
    let filters = escape(&json!({"label": [NAMESPACE_LABEL]}).to_string());
    let services = client.get(&format!("/services?filters={filters}")).await?;
    let mut stacks: BTreeMap<&str, usize> = BTreeMap::new();
    for service in services.as_array().into_iter().flatten() {
        *stacks.entry(service["Spec"]["Labels"][NAMESPACE_LABEL].as_str().unwrap_or_default()).or_default() += 1;
    }
    let rows: Vec<_> = stacks
        .into_iter()
        .map(|(name, count)| json!({"ID": name, "Name": name, "Services": count.to_string(), "Orchestrator": "Swarm"}))
        .collect();
    args.print(&[("Name", "NAME"), ("Services", "SERVICES")], &rows)
}

async fn remove(client: &Client, stack: &str, detach: bool) -> anyhow::Result<()> {
    let (services, tasks) = (services_of(client, stack, false).await?, tasks_of(client, stack).await?);
    let needed = needed_by_volumes(client).await?;
    let mut is_there = !services.is_empty();
    for (kind, of) in [("services", "service"), ("secrets", "secret"), ("configs", "config"), ("networks", "network")] {
        let found = match kind {
            "services" => services.clone(),
            _ => labelled(client, kind, stack).await?,
        };
        is_there |= !found.is_empty();
        for object in found {
            let (id, name) = match kind {
                "networks" => (&object["Id"], &object["Name"]),
                _ => (&object["ID"], &object["Spec"]["Name"]),
            };
            let name = name.as_str().unwrap_or_default();
            if let Some(volume) = id.as_str().and_then(|id| needed.get(id)) {
                line(&format!("Keeping {of} {name}, which volume {volume} needs"))?;
                continue;
            }
            line(&format!("Removing {of} {name}"))?;
            let path = format!("/{kind}/{}", id.as_str().unwrap_or_default());
            if let Err(error) = client.delete(&path).await
                && !crate::client::is_not_found(&error)
            {
                return Err(error);
            }
        }
        if kind == "services" && !detach {
            await_gone(client, stack, &tasks).await?;
        }
    }
    anyhow::ensure!(is_there, "nothing was found of stack {stack}: see 'skep stack ls'");
    Ok(())
}

/// The secrets, by id, without which storage drivers can do nothing with volumes of the swarm; those stay, with what is on
/// them. Each with a volume's name.
async fn needed_by_volumes(client: &Client) -> anyhow::Result<BTreeMap<String, String>> {
    let answer = client.get("/volumes").await?;
    let mut needed = BTreeMap::new();
    for volume in answer["Volumes"].as_array().into_iter().flatten() {
        let secrets = volume["ClusterVolume"]["Spec"]["Secrets"].as_array().into_iter().flatten();
        for id in secrets.filter_map(|secret| secret["Secret"].as_str()) {
            needed.insert(id.to_owned(), volume["Name"].as_str().unwrap_or_default().to_owned());
        }
    }
    Ok(needed)
}

/// The ids of a stack's tasks. Lists do not show those of services that are removed.
async fn tasks_of(client: &Client, stack: &str) -> anyhow::Result<Vec<String>> {
    let tasks = labelled(client, "tasks", stack).await?;
    Ok(tasks.iter().filter_map(|task| task["ID"].as_str().map(str::to_owned)).collect())
}

/// Waits until none of these tasks is left.
async fn await_gone(client: &Client, stack: &str, tasks: &[String]) -> anyhow::Result<()> {
    let deadline = Instant::now() + GONE_LIMIT;
    for id in tasks {
        while client.find(&format!("/tasks/{id}")).await?.is_some() {
            anyhow::ensure!(
                Instant::now() < deadline,
                "tasks of stack {stack} have not ended within {GONE_LIMIT:?}: see 'skep node ls', and remove it again"
            );
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }
    Ok(())
}
