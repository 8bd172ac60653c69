"""The comparison study and its command line: an application that imports the library as a user would."""
