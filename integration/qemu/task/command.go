package task

// Files of the task "node", each followed by a number that counts from 1: the host writes a script for the shell as
// CommandFile, the guest what it prints as OutputFile and then its exit status as StatusFile. ResumeFile ends the task.
const (
	CommandFile = "command-"
	OutputFile  = "output-"
	StatusFile  = "status-"
)
