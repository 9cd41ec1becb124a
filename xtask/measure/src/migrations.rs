//! The rules for a new migration: forward only, no heavy lock without a reason, and both old and new binary work.

mod history;
mod locks;
mod upgrade;

use anyhow::bail;
use common::migrations::{DIR, scripts};
use common::steps::Tally;
use common::workspace;
use harness::{Postgres, Redis};

/// Three checks, each with its fix. The service has been built.
pub(crate) fn check(tally: &mut Tally, postgres: &Postgres, redis: &Redis) {
    let dir = workspace::root().join(DIR);
    let fix = "a migration is never edited once others have it: undo, and `cargo xtask migrate new NAME`";
    let scripts = tally.check("migrations: history", fix, |progress| {
        let scripts = scripts(&dir)?;
        history::check(&dir, &scripts, progress)?;
        Ok(scripts)
    });
    let Some(scripts) = scripts else { return };
    let fix = "as the linter says; drop or rename only what no release in use names; or `-- reason: ...` right above it";
    tally.check("migrations: locks", fix, |_| {
        let broken: Vec<String> = scripts
            .iter()
            .flat_map(|script| {
                locks::broken(&script.sql).into_iter().map(|fault| format!("    {}, {fault}", script.file))
            })
            .collect();
        if !broken.is_empty() {
            bail!("{}", broken.join("\n"));
        }
        Ok(())
    });
    let fix = "let the migration add only; what the old binary uses goes a release later";
    tally
        .check("migrations: under load", fix, |progress| upgrade::check(&scripts, postgres, redis, progress));
}

#[cfg(test)]
mod tests {
    use std::fs;

    use common::migrations::create;
    use harness::Scratch;

    use super::*;

    #[test]
    fn the_next_migration_follows_the_last_and_passes_its_own_rules() {
        let scratch = Scratch::new("migrations").expect("a directory");
        let dir = scratch.path();
        create(dir, "first").expect("a file");
        create(dir, "second_2").expect("a file");
        let found = scripts(dir).expect("scripts");
        let names: Vec<_> =
            found.iter().map(|script| script.file.rsplit('/').next().expect("a name")).collect();
        assert_eq!(names, ["0001_first.sql", "0002_second_2.sql"]);
        assert!(locks::broken(&found[1].sql).is_empty());
        // Its text about reasons is no reason.
        assert_eq!(locks::broken(&format!("{}DROP TABLE users;", found[1].sql)).len(), 1);
        for name in ["Second", "2nd", "a-b", "", "../x"] {
            let error = create(dir, name).expect_err("a bad name").to_string();
            assert!(error.contains("message_reactions"), "{error}");
        }
        fs::write(dir.join("5_x.sql"), "").expect("written");
        assert!(scripts(dir).expect_err("a bad name").to_string().contains("0001_name.sql"));
    }

    #[test]
    fn the_projects_own_migrations_keep_to_the_rules() {
        for script in scripts(&workspace::root().join(DIR)).expect("scripts") {
            assert_eq!(locks::broken(&script.sql), [""; 0], "{}", script.file);
        }
    }
}
