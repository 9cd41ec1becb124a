//! What a migration may do to a table that is in use: squawk's rules, and the few that it lacks. A statement that breaks
//! one passes with a reason above it: `-- reason: the table has ten rows`.

use squawk_linter::{Linter, LinterSettings, Rule, Violation};
use squawk_syntax::SourceFile;
use squawk_syntax::ast::{self, AstNode as _};

/// What sqlx looks for at a script's beginning.
const NO_TRANSACTION: &str = "-- no-transaction";
const REASON: &str = "reason:";

/// Rules that squawk has and does not check unless asked to: an upsert of the old binary may name the index.
const MORE: [Rule; 1] = [Rule::BanDropIndex];
const LESS: [Rule; 3] = [
    // The first scripts set no timeouts, and a script is never edited.
    Rule::RequireLockTimeout,
    Rule::RequireStatementTimeout,
    // sqlx applies a script once. IF NOT EXISTS would keep the invalid index that a failed CONCURRENTLY leaves.
    Rule::PreferRobustStmts,
];

/// The rules that a script breaks without giving a reason: each with its line, and what to do instead.
pub(super) fn broken(sql: &str) -> Vec<String> {
    let lines: Vec<&str> = sql.lines().collect();
    if let Some(at) = lines.iter().position(|line| line.contains("squawk-ignore")) {
        return vec![format!("line {}: `-- reason: ...` instead, which says why", at + 1)];
    }
    let script = SourceFile::parse(sql);
    if let Some(error) = script.errors().first() {
        if lines.iter().any(|line| gives_reason(line)) {
            return Vec::new();
        }
        return vec![format!(
            "the parser does not know this SQL ({error}): put `-- reason: ...` above it that says which locks it takes, \
             and for how long"
        )];
    }
    let outside = sql.trim_start().starts_with(NO_TRANSACTION);
    let mut linter = Linter::with_rules(&MORE, &LESS);
    linter.settings = LinterSettings { assume_in_transaction: !outside, ..LinterSettings::default() };
    let violations = linter.lint(&script, sql);
    let statements: Vec<ast::Stmt> = script.tree().stmts().collect();
    let alone = outside && statements.len() == 1;
    let mut broken = Vec::new();
    for statement in &statements {
        let range = statement.syntax().text_range();
        let line = sql[..usize::from(range.start())].matches('\n').count() + 1;
        let mut faults = Vec::new();
        if !has_reason(&lines, line) {
            let of_statement = |found: &&Violation| range.contains_range(found.text_range);
            faults.extend(violations.iter().filter(of_statement).map(text));
            faults.extend(unknown_to_squawk(statement).map(str::to_owned));
        }
        // No reason makes Postgres take it.
        if !alone && is_concurrent(statement) {
            faults.push(
                "CONCURRENTLY cannot run in a transaction: alone in a file that begins with `-- no-transaction`"
                    .to_owned(),
            );
        }
        broken.extend(faults.into_iter().map(|fault| format!("line {line}: {fault}")));
    }
    broken
}

fn text(Violation { code, message, help, .. }: &Violation) -> String {
    let help = help.as_ref().map(|help| format!(" {help}")).unwrap_or_default();
    format!("{message}{help} (squawk's {code})")
}

/// Whether the comment right above the line gives a reason.
fn has_reason(lines: &[&str], line: usize) -> bool {
    let above = lines[..line - 1].iter().rev();
    above.take_while(|line| line.trim_start().starts_with("--")).any(|line| gives_reason(line))
}

/// A word or two is none, and neither is a comment that only speaks of reasons.
fn gives_reason(line: &str) -> bool {
    let comment = line.trim_start().strip_prefix("--").map(|text| text.trim_start_matches('-').trim_start());
    let reason = comment.and_then(|text| text.strip_prefix(REASON));
    reason.is_some_and(|reason| reason.split_whitespace().count() >= 3)
}

fn is_concurrent(statement: &ast::Stmt) -> bool {
    match statement {
        ast::Stmt::CreateIndex(index) => index.concurrently_token().is_some(),
        ast::Stmt::DropIndex(index) => index.concurrently_token().is_some(),
        _ => false,
    }
}

/// Whole tables locked, which squawk lets pass.
fn unknown_to_squawk(statement: &ast::Stmt) -> Option<&'static str> {
    match statement {
        ast::Stmt::Truncate(_) => Some("TRUNCATE locks out readers, and what is lost does not come back"),
        ast::Stmt::Lock(_) => Some("LOCK TABLE holds requests up until the migration ends"),
        ast::Stmt::Update(update) if update.where_clause_or_current_of().is_none() => {
            Some("UPDATE without WHERE locks and rewrites every row in one transaction: do it in batches")
        }
        ast::Stmt::Delete(delete) if delete.where_clause_or_current_of().is_none() => {
            Some("DELETE without WHERE locks every row in one transaction: do it in batches")
        }
        ast::Stmt::Cluster(_) => Some("CLUSTER rewrites the table under an exclusive lock"),
        ast::Stmt::Do(_) => Some("what DO runs is not looked into: write the statements out"),
        ast::Stmt::AlterTable(alter) => alter.actions().find_map(|action| match action {
            ast::AlterTableAction::SetTablespace(_)
            | ast::AlterTableAction::SetAccessMethod(_)
            | ast::AlterTableAction::SetLogged(_)
            | ast::AlterTableAction::SetUnlogged(_) => {
                Some("ALTER TABLE ... SET TABLESPACE, ACCESS METHOD, LOGGED, UNLOGGED rewrite it under an exclusive lock")
            }
            ast::AlterTableAction::AttachPartition(_) => {
                Some("ATTACH PARTITION reads the whole partition unless a CHECK proves its bounds")
            }
            ast::AlterTableAction::AddColumn(column) => {
                let mut constraints = column.constraints();
                constraints.any(|one| matches!(one, ast::Constraint::CheckConstraint(_))).then_some(
                    "ADD COLUMN with a CHECK reads the table under an exclusive lock: add the constraint NOT VALID, and \
                     VALIDATE it in the next migration",
                )
            }
            _ => None,
        }),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A statement, and the rule of squawk that it breaks or a word of our own complaint.
    const BAD: [(&str, &str); 30] = [
        ("CREATE INDEX i ON messages (sender_id)", "require-concurrent-index-creation"),
        ("CREATE UNIQUE INDEX ON public.messages (id)", "require-concurrent-index-creation"),
        ("CREATE INDEX CONCURRENTLY i ON messages (id)", "no-transaction"),
        ("ALTER TABLE messages ADD COLUMN tag uuid DEFAULT gen_random_uuid()", "adding-field-with-default"),
        (
            "ALTER TABLE messages ADD COLUMN at timestamptz DEFAULT clock_timestamp()",
            "adding-field-with-default",
        ),
        ("ALTER TABLE messages ADD COLUMN n bigserial", "prefer-identity"),
        (
            "ALTER TABLE messages ADD COLUMN n bigint GENERATED ALWAYS AS (seq * 2) STORED",
            "adding-field-with-default",
        ),
        ("ALTER TABLE messages ADD COLUMN note text NOT NULL", "adding-required-field"),
        ("ALTER TABLE messages ADD COLUMN note text UNIQUE", "disallowed-unique-constraint"),
        ("ALTER TABLE messages ADD COLUMN note text CHECK (note <> '')", "ADD COLUMN with a CHECK"),
        ("ALTER TABLE messages ALTER COLUMN content SET NOT NULL", "adding-not-nullable-field"),
        ("ALTER TABLE messages ALTER COLUMN seq TYPE numeric", "changing-column-type"),
        ("ALTER TABLE messages ATTACH PARTITION p DEFAULT", "ATTACH PARTITION"),
        ("ALTER TABLE messages DROP COLUMN content", "ban-drop-column"),
        ("ALTER TABLE messages DROP CONSTRAINT c", "ban-drop-constraint"),
        ("ALTER TABLE messages RENAME COLUMN content TO body", "renaming-column"),
        ("ALTER TABLE messages RENAME TO posts", "renaming-table"),
        ("ALTER TABLE messages ADD CONSTRAINT c CHECK (seq > 0)", "constraint-missing-not-valid"),
        ("ALTER TABLE messages ADD CONSTRAINT u UNIQUE (id)", "disallowed-unique-constraint"),
        ("DROP TABLE messages", "ban-drop-table"),
        ("DROP INDEX i", "ban-drop-index"),
        ("TRUNCATE messages", "TRUNCATE"),
        ("LOCK TABLE messages IN ACCESS EXCLUSIVE MODE", "LOCK"),
        ("UPDATE messages SET content = ''", "batches"),
        ("DELETE FROM messages", "batches"),
        ("CLUSTER messages USING i", "rewrites"),
        ("ALTER TABLE messages SET TABLESPACE other", "rewrite"),
        ("DO $$ BEGIN EXECUTE 'DROP TABLE messages'; END $$", "not looked into"),
        // What the rules before squawk's did not find.
        ("REINDEX INDEX i", "require-concurrent-reindex"),
        ("ALTER TABLE messages ADD COLUMN at timestamp", "prefer-timestamp-tz"),
    ];

    const GOOD: [&str; 9] = [
        "CREATE TABLE t (id uuid PRIMARY KEY, n bigint NOT NULL CHECK (n > 0)); CREATE INDEX ON t (n)",
        "ALTER TABLE messages ADD COLUMN note text",
        "ALTER TABLE messages ADD COLUMN note text NOT NULL DEFAULT 'none (yet)'",
        "ALTER TABLE messages ADD COLUMN at timestamptz NOT NULL DEFAULT now()",
        "ALTER TABLE messages ADD CONSTRAINT c CHECK (seq > 0) NOT VALID",
        "ALTER TABLE messages VALIDATE CONSTRAINT c",
        "ALTER TABLE messages ALTER COLUMN content SET DEFAULT ''",
        "-- no-transaction\nCREATE INDEX CONCURRENTLY i ON messages (id)",
        "UPDATE messages SET content = '' WHERE content = 'x'",
    ];

    #[test]
    fn what_locks_or_breaks_a_table_in_use_is_named_with_its_line_and_the_way_out() {
        for (sql, word) in BAD {
            let found = broken(&format!("-- What it is for.\n\n{sql};\n"));
            assert!(found.iter().any(|fault| fault.contains(word)), "{sql}: {found:?}");
            assert!(found.iter().all(|fault| fault.starts_with("line 3: ")), "{sql}: {found:?}");
        }
    }

    #[test]
    fn what_is_harmless_passes() {
        for sql in GOOD {
            assert_eq!(broken(&format!("{sql};")), [""; 0], "{sql}");
        }
    }

    #[test]
    fn a_reason_right_above_the_statement_lets_it_pass_and_no_other() {
        let sql = "TRUNCATE messages;\n-- Old.\n-- reason: the table is empty in every installation\nDROP TABLE\nold;\n";
        assert_eq!(broken(sql).len(), 1, "{:?}", broken(sql));
        assert!(broken("-- reason: because\nDROP TABLE old;")[0].contains("ban-drop-table"), "too short");
        assert_eq!(broken("-- It needs `-- reason: ...` above it, one says.\nDROP TABLE old;").len(), 1);
        assert_eq!(broken("DROP TABLE old;\n-- reason: that is far below it\n").len(), 1);
        let ignored = broken("-- squawk-ignore ban-drop-table\nDROP TABLE old;");
        assert!(ignored[0].contains("-- reason: ..."), "{ignored:?}");
    }

    #[test]
    fn sql_that_the_parser_does_not_know_needs_a_reason() {
        let sql = "ALTER TABLE messages FROBNICATE THE COLUMN;";
        assert!(broken(sql)[0].contains("reason"), "{:?}", broken(sql));
        assert!(broken(&format!("-- reason: takes no lock at all\n{sql}")).is_empty());
    }
}
