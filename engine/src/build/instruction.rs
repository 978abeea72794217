//! What instructions say of an image's configuration; those that change no file.

use skep_api::container::HealthConfig;
use skep_api::units::Nanos;

use crate::build::parse::{self, Instruction};
use crate::build::words;
use crate::image::store::ImageConfig;

/// A configuration under way.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Draft {
    pub(crate) config: ImageConfig,
    /// Whether the command is this Dockerfile's own: a new entrypoint takes an inherited one away.
    pub(crate) cmd_is_own: bool,
    pub(crate) author: String,
}

/// What a word's variables stand for.
pub(crate) type Lookup<'a> = &'a dyn Fn(&str) -> Option<String>;

impl Draft {
    /// Applies an instruction that changes no file; `None` if it is one that does.
    pub(crate) fn apply(
        &mut self,
        instruction: &Instruction,
        escape: char,
        lookup: Lookup<'_>,
    ) -> Option<Result<(), String>> {
        let rest = instruction.rest.as_str();
        let expand = |word: &str| words::expand(word, escape, lookup);
        let all = || words::split(rest, escape).iter().map(|word| expand(word)).collect::<Result<Vec<_>, _>>();
        let applied = match instruction.name.as_str() {
            "ENV" => pairs("ENV", rest, escape, lookup).map(|pairs| {
                for (key, value) in pairs {
                    set_env(&mut self.config.env, &key, &value);
                }
            }),
            "LABEL" => pairs("LABEL", rest, escape, lookup).map(|pairs| self.config.labels.extend(pairs)),
            "EXPOSE" => all().and_then(|words| {
                // A variable may hold several.
                for port in words.iter().flat_map(|word| word.split_whitespace()) {
                    for port in expose(port)? {
                        self.config.exposed_ports.insert(port, serde_json::json!({}));
                    }
                }
                Ok(())
            }),
            "CMD" => {
                self.config.cmd = self.command(rest);
                self.cmd_is_own = true;
                Ok(())
            }
            "ENTRYPOINT" => {
                self.config.entrypoint = self.command(rest);
                if !self.cmd_is_own {
                    self.config.cmd.clear();
                }
                Ok(())
            }
            "USER" => expand(rest).map(|user| self.config.user = user),
            "VOLUME" => match json_list(rest) {
                Some(list) => list.iter().map(|word| expand(word)).collect::<Result<Vec<_>, _>>(),
                None => all(),
            }
            .and_then(|targets| {
                if targets.iter().any(|target| target.trim().is_empty()) {
                    return Err("VOLUME specified can not be an empty string".into());
                }
                self.config.volumes.extend(targets.into_iter().map(|target| (target, serde_json::json!({}))));
                Ok(())
            }),
            "STOPSIGNAL" => expand(rest).map(|signal| self.config.stop_signal = signal),
            "SHELL" => json_list(rest)
                .filter(|list| !list.is_empty())
                .map(|list| self.config.shell = list)
                .ok_or_else(|| "SHELL requires the arguments to be in JSON form".into()),
            "ONBUILD" => self.on_build(instruction.line, rest),
            "HEALTHCHECK" => health_check(instruction, self.shell()).map(|check| self.config.healthcheck = Some(check)),
            "MAINTAINER" => {
                rest.clone_into(&mut self.author);
                Ok(())
            }
            _ => return None,
        };
        Some(applied.map_err(|error| format!("{} (line {}): {error}", instruction.name, instruction.line)))
    }

    fn on_build(&mut self, line: usize, rest: &str) -> Result<(), String> {
        let trigger = parse::instruction(line, rest)?;
        if matches!(trigger.name.as_str(), "ONBUILD" | "FROM" | "MAINTAINER") {
            return Err(format!("{} isn't allowed as an ONBUILD trigger", trigger.name));
        }
        self.config.on_build.push(rest.to_owned());
        Ok(())
    }

    /// What runs commands that are given as one string.
    pub(crate) fn shell(&self) -> Vec<String> {
        if self.config.shell.is_empty() { vec!["/bin/sh".into(), "-c".into()] } else { self.config.shell.clone() }
    }

    /// A command line: a JSON list as it is, anything else by the shell.
    pub(crate) fn command(&self, rest: &str) -> Vec<String> {
        match json_list(rest) {
            Some(list) => list,
            None if rest.is_empty() => Vec::new(),
            None => self.shell().into_iter().chain([rest.to_owned()]).collect(),
        }
    }
}

pub(crate) fn set_env(env: &mut Vec<String>, key: &str, value: &str) {
    let new = format!("{key}={value}");
    match env.iter_mut().find(|var| var.split('=').next() == Some(key)) {
        Some(var) => *var = new,
        None => env.push(new),
    }
}

pub(crate) fn json_list(text: &str) -> Option<Vec<String>> {
    text.trim_start().starts_with('[').then(|| serde_json::from_str(text).ok()).flatten()
}

/// `key=value …`, or the old form `key value`.
fn pairs(name: &str, rest: &str, escape: char, lookup: Lookup<'_>) -> Result<Vec<(String, String)>, String> {
    let expand = |word: &str| words::expand(word, escape, lookup);
    let all = words::split(rest, escape);
    let first = all.first().map_or("", String::as_str);
    if !first.contains('=') {
        let (key, value) =
            rest.split_once(char::is_whitespace).ok_or_else(|| format!("{name} must have two arguments"))?;
        return Ok(vec![(expand(key)?, expand(value.trim())?)]);
    }
    let pair = |word: &String| {
        let (key, value) = word.split_once('=').ok_or_else(|| format!("{word:?} has no =: write {name} key=value"))?;
        let key = expand(key)?;
        if key.is_empty() { Err(format!("{name} names can not be blank")) } else { Ok((key, expand(value)?)) }
    };
    all.iter().map(pair).collect()
}

/// `80`, `80/udp`, `8000-8002`.
fn expose(text: &str) -> Result<Vec<String>, String> {
    let wrong = || format!("invalid port {text:?}: write 80, 80/udp or 8000-8002");
    let (numbers, protocol) = text.split_once('/').unwrap_or((text, "tcp"));
    let protocol = protocol.to_ascii_lowercase();
    if !matches!(protocol.as_str(), "tcp" | "udp" | "sctp") {
        return Err(wrong());
    }
    let (first, last) = numbers.split_once('-').unwrap_or((numbers, numbers));
    let (first, last): (u16, u16) = (first.parse().map_err(|_| wrong())?, last.parse().map_err(|_| wrong())?);
    if first > last {
        return Err(wrong());
    }
    Ok((first..=last).map(|port| format!("{port}/{protocol}")).collect())
}

fn health_check(instruction: &Instruction, shell: Vec<String>) -> Result<HealthConfig, String> {
    let (kind, rest) = instruction.rest.split_once(char::is_whitespace).unwrap_or((&instruction.rest, ""));
    if kind.eq_ignore_ascii_case("NONE") {
        return Ok(HealthConfig { test: vec!["NONE".into()], ..HealthConfig::default() });
    }
    if !kind.eq_ignore_ascii_case("CMD") || rest.trim().is_empty() {
        return Err(format!("unknown type {kind:?}: write CMD with a command, or NONE"));
    }
    let test = match json_list(rest.trim()) {
        Some(list) => ["CMD".to_owned()].into_iter().chain(list).collect(),
        None if shell == ["/bin/sh", "-c"] => vec!["CMD-SHELL".into(), rest.trim().into()],
        None => ["CMD".to_owned()].into_iter().chain(shell).chain([rest.trim().to_owned()]).collect(),
    };
    let mut check = HealthConfig { test, ..HealthConfig::default() };
    for (flag, value) in &instruction.flags {
        let duration = || {
            let parsed =
                skep_api::units::parse_duration(value).ok_or_else(|| format!("--{flag}={value:?} is no duration"))?;
            Ok::<_, String>(Nanos(i64::try_from(parsed.as_nanos()).unwrap_or(i64::MAX)))
        };
        match flag.as_str() {
            "interval" => check.interval = duration()?,
            "timeout" => check.timeout = duration()?,
            "start-period" => check.start_period = duration()?,
            "start-interval" => check.start_interval = duration()?,
            "retries" => check.retries = value.parse().map_err(|_| format!("--retries={value:?} is no number"))?,
            _ => return Err(format!("unknown flag --{flag}")),
        }
    }
    Ok(check)
}

/// Applies changes as `commit --change` and `import --change` take them.
pub(crate) fn apply_changes(config: ImageConfig, changes: &[String]) -> Result<ImageConfig, String> {
    let mut draft = Draft { config, ..Draft::default() };
    for line in changes.iter().flat_map(|change| change.lines()).filter(|line| !line.trim().is_empty()) {
        let instruction = parse::instruction(1, line)?;
        if instruction.name == "WORKDIR" {
            instruction.rest.clone_into(&mut draft.config.working_dir);
            continue;
        }
        let env = draft.config.env.clone();
        let lookup =
            |name: &str| env.iter().find_map(|var| var.strip_prefix(name)?.strip_prefix('=').map(str::to_owned));
        match draft.apply(&instruction, '\\', &lookup) {
            Some(applied) => applied?,
            None => return Err(format!("{} is not a valid change command", instruction.name.to_lowercase())),
        }
    }
    Ok(draft.config)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(changes: &[&str], want: &str) {
        let changes: Vec<_> = changes.iter().map(|&change| change.to_owned()).collect();
        let got =
            apply_changes(ImageConfig::default(), &changes).map_or_else(|error| error, |config| format!("{config:?}"));
        assert!(got.contains(want), "{got} should say {want}");
    }

    #[test]
    fn instructions_change_the_configuration() {
        check(&["ENV a=1 b=\"2 3\"", "ENV c $a"], r#"env: ["a=1", "b=2 3", "c=1"]"#);
        check(&["LABEL x='y z'"], r#"labels: {"x": "y z"}"#);
        check(&["CMD echo hi"], r#"cmd: ["/bin/sh", "-c", "echo hi"]"#);
        check(&["SHELL [\"/bin/ash\"]", "ENTRYPOINT hi"], r#"entrypoint: ["/bin/ash", "hi"]"#);
        check(&["EXPOSE 80 90-91/udp"], r#""80/tcp": Object {}, "90/udp": Object {}, "91/udp""#);
        check(&["EXPOSE many"], "invalid port");
        check(
            &["HEALTHCHECK --interval=5s --retries=2 CMD true"],
            r#"test: ["CMD-SHELL", "true"], interval: Nanos(5000000000)"#,
        );
        check(&["VOLUME [\"/a\", \"/b\"]"], r#"volumes: {"/a": Object {}, "/b""#);
        check(&["ONBUILD RUN x"], r#"on_build: ["RUN x"]"#);
        check(&["ONBUILD FROM x"], "isn't allowed");
        check(&["RUN x"], "run is not a valid change command");
    }

    #[test]
    fn a_new_entrypoint_takes_an_inherited_command_away() {
        let config = ImageConfig { cmd: vec!["old".into()], ..ImageConfig::default() };
        assert!(apply_changes(config.clone(), &["ENTRYPOINT [\"x\"]".into()]).unwrap().cmd.is_empty());
        let own = apply_changes(config, &["CMD [\"own\"]".into(), "ENTRYPOINT [\"x\"]".into()]).unwrap();
        assert_eq!(own.cmd, ["own"]);
    }
}
