"""`ftray doctor`"""

import typer


def doctor() -> None:
    """What is wrong with this machine, and the fix."""
    from ftray.cluster.doctor import examine

    findings = examine()
    for finding in findings:
        print(f"{finding.level:<5} {finding.subject:<14} {finding.text}")
        if finding.fix:
            print(f"{'':<20} fix: {finding.fix}")
    if any(finding.level == "FAIL" for finding in findings):
        raise typer.Exit(1)
