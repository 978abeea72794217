//! How many tasks a service has, and how long: replicas, one on each node, or jobs that run to their end.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize, Serializer};
use skep_api_derive::Extensible;

use crate::service::{REPLICAS_MAX, ServiceSpecError};
use crate::timestamp::Timestamp;

/// What tasks a service has. The mode's kind never changes, its numbers may.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Extensible, Serialize, Deserialize)]
#[serde(try_from = "ModeJson", into = "ModeJson")]
pub enum ServiceMode {
    Replicated {
        replicas: u64,
    },
    Global,
    /// Tasks that end well so often, and run so many at a time.
    ReplicatedJob {
        max_concurrent: u64,
        total_completions: u64,
    },
    /// A task that ends well on each node.
    GlobalJob,
}

impl Default for ServiceMode {
    fn default() -> Self {
        Self::Replicated { replicas: 1 }
    }
}

impl ServiceMode {
    /// The word of the Engine API.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Replicated { .. } => "replicated",
            Self::Global => "global",
            Self::ReplicatedJob { .. } => "replicated-job",
            Self::GlobalJob => "global-job",
        }
    }

    /// Whether its tasks run to their end instead of for ever.
    #[must_use]
    pub const fn is_job(self) -> bool {
        match self {
            Self::Replicated { .. } | Self::Global => false,
            Self::ReplicatedJob { .. } | Self::GlobalJob => true,
        }
    }

    /// Checks the numbers.
    pub(crate) fn validate(self) -> Result<(), ServiceSpecError> {
        match self {
            Self::Global | Self::GlobalJob => Ok(()),
            Self::Replicated { replicas: tasks } | Self::ReplicatedJob { total_completions: tasks, .. }
                if tasks > REPLICAS_MAX =>
            {
                Err(ServiceSpecError::Replicas(tasks))
            }
            Self::ReplicatedJob { max_concurrent: 0, total_completions: 1.. } => Err(ServiceSpecError::OutOfRange {
                field: "max-concurrent",
                value: "0".into(),
                rule: "a job of which no task may run never ends: at least 1 is needed",
            }),
            Self::Replicated { .. } | Self::ReplicatedJob { .. } => Ok(()),
        }
    }
}

/// Which run of a job is on, and since when.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Extensible, Serialize)]
#[serde(rename_all = "PascalCase")]
pub struct JobStatus {
    /// Counts updates: each begins the job anew.
    #[serde(rename = "JobIteration", serialize_with = "indexed")]
    pub iteration: u64,
    pub last_execution: Timestamp,
}

impl JobStatus {
    /// The first run.
    #[must_use]
    pub const fn first(at: Timestamp) -> Self {
        Self { iteration: 0, last_execution: at }
    }

    /// The run after this one.
    #[must_use]
    pub const fn next(self, at: Timestamp) -> Self {
        Self { iteration: self.iteration + 1, last_execution: at }
    }
}

#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct Indexed {
    index: u64,
}

/// As the Engine API writes versions.
#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde hands a reference")]
pub(crate) fn indexed<S: Serializer>(index: &u64, serializer: S) -> Result<S::Ok, S::Error> {
    Indexed { index: *index }.serialize(serializer)
}

/// The same of one that may be absent; for `serialize_with`.
#[expect(clippy::ref_option, reason = "serde hands a reference")]
pub(crate) fn indexed_if_any<S: Serializer>(index: &Option<u64>, serializer: S) -> Result<S::Ok, S::Error> {
    index.map(|index| Indexed { index }).serialize(serializer)
}

/// The Engine API's form of [`ServiceMode`]: one member that is present.
#[derive(Clone, Default, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
struct ModeJson {
    #[serde(skip_serializing_if = "Option::is_none")]
    replicated: Option<ReplicatedJson>,
    #[serde(skip_serializing_if = "Option::is_none")]
    global: Option<BTreeMap<String, ()>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    replicated_job: Option<ReplicatedJobJson>,
    #[serde(skip_serializing_if = "Option::is_none")]
    global_job: Option<BTreeMap<String, ()>>,
}

#[derive(Clone, Default, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
struct ReplicatedJson {
    replicas: Option<u64>,
}

#[derive(Clone, Default, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
struct ReplicatedJobJson {
    max_concurrent: Option<u64>,
    total_completions: Option<u64>,
}

impl From<ReplicatedJobJson> for ServiceMode {
    fn from(json: ReplicatedJobJson) -> Self {
        let max_concurrent = json.max_concurrent.unwrap_or(1);
        Self::ReplicatedJob { max_concurrent, total_completions: json.total_completions.unwrap_or(max_concurrent) }
    }
}

impl TryFrom<ModeJson> for ServiceMode {
    type Error = &'static str;

    fn try_from(json: ModeJson) -> Result<Self, Self::Error> {
        let replicated = json.replicated.map(|given| Self::Replicated { replicas: given.replicas.unwrap_or(1) });
        let given = [
            replicated,
            json.global.map(|_| Self::Global),
            json.replicated_job.map(Self::from),
            json.global_job.map(|_| Self::GlobalJob),
        ];
        let mut given = given.into_iter().flatten();
        match (given.next(), given.next()) {
            (mode, None) => Ok(mode.unwrap_or_default()),
            (_, Some(_)) => Err("must specify only one service mode: replicated, global, replicated-job or global-job"),
        }
    }
}

impl From<ServiceMode> for ModeJson {
    fn from(mode: ServiceMode) -> Self {
        let there = || Some(BTreeMap::new());
        match mode {
            ServiceMode::Replicated { replicas } => {
                Self { replicated: Some(ReplicatedJson { replicas: Some(replicas) }), ..Self::default() }
            }
            ServiceMode::Global => Self { global: there(), ..Self::default() },
            ServiceMode::ReplicatedJob { max_concurrent, total_completions } => {
                let json = ReplicatedJobJson {
                    max_concurrent: Some(max_concurrent),
                    total_completions: Some(total_completions),
                };
                Self { replicated_job: Some(json), ..Self::default() }
            }
            ServiceMode::GlobalJob => Self { global_job: there(), ..Self::default() },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mode_reads_and_writes_as_docker_does() {
        let read = |json: &str| serde_json::from_str::<ServiceMode>(json);
        assert_eq!(read(r#"{"Global":{}}"#).unwrap(), ServiceMode::Global);
        assert_eq!(read(r#"{"Replicated":{"Replicas":3}}"#).unwrap(), ServiceMode::Replicated { replicas: 3 });
        assert_eq!(read("{}").unwrap(), ServiceMode::Replicated { replicas: 1 });
        assert!(read(r#"{"Global":{},"Replicated":{}}"#).is_err());
        assert!(read(r#"{"GlobalJob":{},"Replicated":{}}"#).is_err());
        for (json, max_concurrent, total_completions) in [
            (r#"{"ReplicatedJob":{}}"#, 1, 1),
            (r#"{"ReplicatedJob":{"MaxConcurrent":3}}"#, 3, 3),
            (r#"{"ReplicatedJob":{"TotalCompletions":5}}"#, 1, 5),
            (r#"{"ReplicatedJob":{"MaxConcurrent":2,"TotalCompletions":6}}"#, 2, 6),
        ] {
            assert_eq!(read(json).unwrap(), ServiceMode::ReplicatedJob { max_concurrent, total_completions }, "{json}");
        }
        for json in
            [r#"{"Global":{}}"#, r#"{"GlobalJob":{}}"#, r#"{"ReplicatedJob":{"MaxConcurrent":2,"TotalCompletions":6}}"#]
        {
            assert_eq!(serde_json::to_string(&read(json).unwrap()).unwrap(), json);
        }
    }

    #[test]
    fn numbers_that_cannot_be_are_refused() {
        let job = |max_concurrent, total_completions| ServiceMode::ReplicatedJob { max_concurrent, total_completions };
        assert!(job(0, 0).validate().is_ok());
        assert!(job(0, 1).validate().unwrap_err().to_string().contains("at least 1"));
        assert!(job(1, u64::MAX).validate().unwrap_err().to_string().contains("too many"));
    }
}
