//! `skep secret …` and `skep config …`: the same verbs on two kinds.

use std::io::Read as _;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use serde_json::{Value, json};

use crate::client::Client;
use crate::commands::values::members;
use crate::output::{FormatArg, ListArgs, ago, line};

#[derive(clap::Subcommand)]
pub(crate) enum SecretCommand {
    /// Keep a secret, from a file or standard input
    Create(CreateArgs),
    /// List the secrets
    Ls(ListArgs),
    /// Show secrets, never what they hold
    Inspect(InspectArgs),
    /// Remove secrets that no service uses
    Rm(RemoveArgs),
}

#[derive(clap::Subcommand)]
pub(crate) enum ConfigCommand {
    /// Keep a config, from a file or standard input
    Create(CreateArgs),
    /// List the configs
    Ls(ListArgs),
    /// Show configs
    Inspect(InspectArgs),
    /// Remove configs that no service uses
    Rm(RemoveArgs),
}

#[derive(clap::Args)]
pub(crate) struct CreateArgs {
    #[arg(short, long = "label", value_name = "KEY=VALUE")]
    labels: Vec<String>,
    /// Fill it in for each task, as a template: golang
    #[arg(long, value_name = "DRIVER")]
    template_driver: Option<String>,
    name: String,
    /// A file, or - for standard input
    file: String,
}

#[derive(clap::Args)]
pub(crate) struct InspectArgs {
    #[arg(required = true)]
    names: Vec<String>,
    /// For people to read
    #[arg(long, conflicts_with = "format")]
    pretty: bool,
    #[command(flatten)]
    format: FormatArg,
}

#[derive(clap::Args)]
pub(crate) struct RemoveArgs {
    #[arg(required = true)]
    names: Vec<String>,
}

pub(crate) async fn run_secret(client: &Client, command: SecretCommand) -> anyhow::Result<()> {
    match command {
        SecretCommand::Create(args) => create(client, "secrets", args).await,
        SecretCommand::Ls(args) => list(client, "secrets", &args).await,
        SecretCommand::Inspect(args) => inspect(client, "secrets", args).await,
        SecretCommand::Rm(args) => remove(client, "secrets", args).await,
    }
}

pub(crate) async fn run_config(client: &Client, command: ConfigCommand) -> anyhow::Result<()> {
    match command {
        ConfigCommand::Create(args) => create(client, "configs", args).await,
        ConfigCommand::Ls(args) => list(client, "configs", &args).await,
        ConfigCommand::Inspect(args) => inspect(client, "configs", args).await,
        ConfigCommand::Rm(args) => remove(client, "configs", args).await,
    }
}

async fn create(client: &Client, kind: &str, args: CreateArgs) -> anyhow::Result<()> {
    let mut bytes = Vec::new();
    if args.file == "-" {
        std::io::stdin().read_to_end(&mut bytes)?;
    } else {
        bytes = std::fs::read(&args.file).map_err(|error| anyhow::anyhow!("{}: {error}", args.file))?;
    }
    let mut body = json!({"Name": args.name, "Labels": members(&args.labels), "Data": BASE64_STANDARD.encode(bytes)});
    if let Some(driver) = args.template_driver {
        body["Templating"] = json!({"Name": driver});
    }
    let created = client.post(&format!("/{kind}/create"), &body).await?;
    line(created["ID"].as_str().unwrap_or_default())
}

async fn list(client: &Client, kind: &str, args: &ListArgs) -> anyhow::Result<()> {
    let values = client.get(&format!("/{kind}?{}", args.query()?)).await?;
    let row = |value: &Value| {
        json!({
            "ID": value["ID"], "Name": value["Spec"]["Name"], "Created": ago(&value["CreatedAt"]),
            "Updated": ago(&value["UpdatedAt"]),
        })
    };
    let rows: Vec<_> = values.as_array().into_iter().flatten().map(row).collect();
    args.print(&[("ID", "ID"), ("Name", "NAME"), ("Created", "CREATED"), ("Updated", "UPDATED")], &rows)
}

async fn inspect(client: &Client, kind: &str, args: InspectArgs) -> anyhow::Result<()> {
    let mut values = Vec::new();
    for name in args.names {
        values.push(client.get(&format!("/{kind}/{name}")).await?);
    }
    args.format.print_all_or_pretty(&values, args.pretty)
}

async fn remove(client: &Client, kind: &str, args: RemoveArgs) -> anyhow::Result<()> {
    for name in args.names {
        client.delete(&format!("/{kind}/{name}")).await?;
        line(&name)?;
    }
    Ok(())
}
