//! Removing what nobody uses: `skep system prune` and the prune of each kind.

use std::io::{BufRead as _, IsTerminal as _, Write as _};

use serde_json::{Value, json};

use super::stats::bytes;
use crate::client::{Client, escape};
use crate::output::{filters, line};

/// A kind of thing, where it is pruned, and what the daemon names in its answer.
#[derive(Clone, Copy)]
pub(crate) struct Kind {
    what: &'static str,
    path: &'static str,
    removed: &'static str,
}

pub(crate) const CONTAINERS: Kind =
    Kind { what: "all containers that do not run", path: "/containers/prune", removed: "ContainersDeleted" };
pub(crate) const NETWORKS: Kind =
    Kind { what: "all networks that nobody uses", path: "/networks/prune", removed: "NetworksDeleted" };
pub(crate) const VOLUMES: Kind =
    Kind { what: "volumes that no container has", path: "/volumes/prune", removed: "VolumesDeleted" };
pub(crate) const IMAGES: Kind =
    Kind { what: "images that nobody uses", path: "/images/prune", removed: "ImagesDeleted" };
pub(crate) const BUILDS: Kind = Kind { what: "the build cache", path: "/build/prune", removed: "CachesDeleted" };

#[derive(Clone, Debug, Default, clap::Args)]
pub(crate) struct PruneArgs {
    /// Ask no questions
    #[arg(short, long)]
    force: bool,
    /// Only what matches, such as until=24h or label=KEY (repeatable)
    #[arg(long, value_name = "KEY=VALUE")]
    filter: Vec<String>,
}

/// With those that have a name, too.
#[derive(clap::Args)]
pub(crate) struct PruneAllArgs {
    /// Those with a name, too
    #[arg(short, long)]
    all: bool,
    #[command(flatten)]
    prune: PruneArgs,
}

#[derive(clap::Args)]
pub(crate) struct PruneSystemArgs {
    /// Images that have a name, too
    #[arg(short, long)]
    all: bool,
    /// Nameless volumes, too
    #[arg(long)]
    volumes: bool,
    #[command(flatten)]
    prune: PruneArgs,
}

/// Whether the user says yes; who cannot be asked has to say so beforehand.
fn agree(args: &PruneArgs, what: &[&str]) -> anyhow::Result<bool> {
    if args.force {
        return Ok(true);
    }
    anyhow::ensure!(
        std::io::stdin().is_terminal(),
        "this removes {}: nobody can be asked here, so give --force if it is meant",
        what.join(", ")
    );
    write!(std::io::stderr(), "This removes {}. Go on? [y/N] ", what.join(", "))?;
    let mut answer = String::new();
    std::io::stdin().lock().read_line(&mut answer)?;
    Ok(answer.trim().eq_ignore_ascii_case("y"))
}

pub(crate) async fn run(client: &Client, kind: Kind, args: &PruneArgs) -> anyhow::Result<()> {
    if agree(args, &[kind.what])? {
        let freed = prune(client, kind, filters(&args.filter)?).await?;
        line(&format!("Total reclaimed space: {}", bytes(freed)))?;
    }
    Ok(())
}

/// Volumes without a name alone, unless all are asked for.
pub(crate) async fn run_volumes(client: &Client, args: &PruneAllArgs) -> anyhow::Result<()> {
    run(client, VOLUMES, &with_filter(&args.prune, args.all, "all=true")).await
}

/// Images without a name alone, unless all are asked for.
pub(crate) async fn run_images(client: &Client, args: &PruneAllArgs) -> anyhow::Result<()> {
    run(client, IMAGES, &with_filter(&args.prune, args.all, "dangling=false")).await
}

fn with_filter(args: &PruneArgs, wanted: bool, filter: &str) -> PruneArgs {
    let mut args = args.clone();
    args.filter.extend(wanted.then(|| filter.to_owned()));
    args
}

pub(crate) async fn run_system(client: &Client, args: &PruneSystemArgs) -> anyhow::Result<()> {
    let kinds: Vec<Kind> =
        [CONTAINERS, NETWORKS].into_iter().chain(args.volumes.then_some(VOLUMES)).chain([IMAGES, BUILDS]).collect();
    if !agree(&args.prune, &kinds.iter().map(|kind| kind.what).collect::<Vec<_>>())? {
        return Ok(());
    }
    let mut freed = 0.0;
    for kind in kinds {
        let images = kind.path == IMAGES.path;
        let args = with_filter(&args.prune, images && args.all, "dangling=false");
        let mut filters = filters(&args.filter)?;
        if kind.path == VOLUMES.path
            && let Some(filters) = filters.as_object_mut()
        {
            // A volume has no age.
            filters.remove("until");
        }
        freed += prune(client, kind, filters).await?;
    }
    line(&format!("Total reclaimed space: {}", bytes(freed)))
}

/// Removes one kind, and names what went; returns the bytes that are free now.
async fn prune(client: &Client, kind: Kind, filters: Value) -> anyhow::Result<f64> {
    let answer = client.post(&format!("{}?filters={}", kind.path, escape(&filters.to_string())), &json!({})).await?;
    for entry in answer[kind.removed].as_array().into_iter().flatten() {
        match entry {
            Value::Object(entry) => {
                for (what, name) in entry {
                    line(&format!("{what}: {}", name.as_str().unwrap_or_default()))?;
                }
            }
            other => line(other.as_str().unwrap_or_default())?,
        }
    }
    Ok(answer["SpaceReclaimed"].as_f64().unwrap_or(0.0))
}
